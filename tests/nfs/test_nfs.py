"""Checkpoints on NFS v3 and v4.2: what holds on a local file system holds here too, or is refused with a word.

Server and client are Linux machines of their own (User-Mode Linux), joined by a wire. `make nfs` runs this.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from machines import Machines, reason_unavailable, running
from support.scenarios import SCENARIOS, count

pytestmark = [
    pytest.mark.nfs,
    pytest.mark.slow,
    pytest.mark.skipif(reason_unavailable() is not None, reason=f"needs: {reason_unavailable()}"),
    pytest.mark.timeout(1800),
]

SCENARIO_NAMES = [name for name in SCENARIOS if name != "overwrite"]
#: Before anything counts as hung: these machines are slow.
_PATIENCE_SECONDS = 120.0


@pytest.fixture(scope="module", params=["3", "4.2"], ids=["v3", "v4.2"])
def machines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with running(tmp_path_factory.mktemp("nfs"), request.param) as machines:
        yield machines


@pytest.mark.parametrize("scenario", SCENARIO_NAMES)
def test_a_checkpoint_comes_back_bit_equal(machines: Machines, scenario: str) -> None:
    said = machines.client.call("round_trip", path=f"/run/a/round-{scenario}", scenario=scenario)
    kept = {"4": 4} if scenario == "retention" else {"3": 3, "4": 4}
    assert kept.items() <= said["visible"].items()
    assert set(said["visible"]) <= {"1", "2", "3", "4"}
    if scenario == "links":
        assert said["written_bytes"] < said["nbytes"], "nothing was linked"


def test_a_step_that_is_there_is_not_replaced_without_an_exchange_of_names(machines: Machines) -> None:
    said = machines.client.call("refuse_to_replace", path="/run/a/replace")
    assert "cannot exchange two names" in said
    assert "Save another step" in said


def test_the_doctor_says_what_nfs_lacks(machines: Machines) -> None:
    said = machines.client.call("doctor", path="/run/a")
    found = {finding["check"]: finding for finding in said["findings"]}
    assert said["exit_code"] == 0, said
    assert not said["unsafe"]
    assert found["file system"]["status"] == "warning"
    assert found["rename without replacing"]["status"] == "warning"
    assert "EINVAL" in found["rename without replacing"]["seen"]
    assert "overwrite=True fails here" in found["rename exchanging"]["advice"]
    assert found["locks"]["status"] == "warning", "locks of another machine were taken for good"
    print({name: (finding["status"], finding["seen"]) for name, finding in found.items()})


def test_a_second_run_is_refused_and_a_dead_ones_lease_is_taken_over(machines: Machines) -> None:
    other_mount = machines.mount("/run/b")
    machines.client.call("hold", path="/run/a/held")
    for point in ("/run/a", other_mount):
        said = machines.client.call("try_to_save", path=f"{point}/held", step=2)
        assert "in use by another live run" in said["refused"], f"two runs of one directory, by {point}"
    machines.client.call("let_die", path="/run/a/held")
    said = machines.client.call("try_to_save", path=f"{other_mount}/held", step=2)
    assert not said["refused"]
    assert machines.client.call("visible", path="/run/a/held") == {"1": 1, "2": 2}


def test_another_machine_is_refused_and_takes_over_from_the_dead(machines: Machines) -> None:
    machines.mount("/run/c", guest=machines.server)
    machines.client.call("hold", path="/run/a/far")
    said = machines.server.call("try_to_save", path="/run/c/far", step=2, ttl_seconds=12.0)
    assert "in use by another live run" in said["refused"]
    machines.client.call("let_die", path="/run/a/far")
    said = machines.server.call("try_to_save", path="/run/c/far", step=2, ttl_seconds=12.0)
    assert not said["refused"]
    assert said["seconds"] > 11, "a holder on another machine was not waited for"
    assert machines.client.call("visible", path="/run/a/far") == {"1": 1, "2": 2}


def test_a_file_that_is_open_while_its_checkpoint_is_deleted_harms_nothing(machines: Machines) -> None:
    said = machines.client.call("delete_while_open", path="/run/a/open")
    assert said["renamed"], "the client made no .nfs file: nothing was tried"
    assert said["left"], "the .nfs file's directory was not left for the next run"
    assert said["left_after_the_next_run"] == []


def test_a_checkpoint_that_is_being_read_is_kept(machines: Machines) -> None:
    assert machines.client.call("delete_while_read", path="/run/a/read", reader_path="/run/a/read") == [1, 2]
    reader_path = machines.mount("/run/d") + "/read-d"
    assert machines.client.call("delete_while_read", path="/run/a/read-d", reader_path=reader_path) == [1, 2]


@pytest.mark.parametrize("reader", ["same machine", "other machine"])
def test_a_reader_elsewhere_sees_complete_checkpoints_only(machines: Machines, reader: str) -> None:
    guest = machines.client if reader == "same machine" else machines.server
    point = machines.mount(f"/run/reader-{reader[0]}", guest=guest)
    folder = f"read-while-{reader[0]}"
    guest.call("ready")
    machines.client.call("start_training", path=f"/run/a/{folder}", options={})
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while machines.client.call("training")["steps"] < 20:
        assert time.monotonic() < deadline, "training does not begin"
        time.sleep(0.1)
    seconds = count("NFS_READ_SECONDS", 15)
    said = guest.call("watch", path=f"{point}/{folder}", seconds=seconds, timeout_seconds=seconds + _PATIENCE_SECONDS)
    trained = machines.client.call("training", end=True)
    assert not trained["errors"] + trained["untyped"]
    assert said["reads"] > 3, said
    print(reader, said)


def test_kills_at_random_lose_nothing(machines: Machines) -> None:
    number = count("NFS_SIGKILLS", 30)
    said = machines.client.call("kills", path="/run/a/kills", number=number, seed="nfs", timeout_seconds=20.0 * number)
    assert said["deaths"] == number
    assert said["in_flight"] > number // 10, "hardly a kill hit a save in flight"
    print(f"NFS v{machines.version}: {said}")
