"""The NFS server stops, or loses its power, or both machines do, in the middle of saves: nothing acknowledged is lost.

An acknowledgement is a file on the host, made the moment that the trainer in the guest gets it.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from calls import CallFailed
from machines import Machines, reason_unavailable, running
from support.scenarios import SCENARIOS, count

pytestmark = [
    pytest.mark.nfs,
    pytest.mark.slow,
    pytest.mark.skipif(reason_unavailable() is not None, reason=f"needs: {reason_unavailable()}"),
    pytest.mark.timeout(3600),
]

_PATIENCE_SECONDS = 120.0
#: A save's deadline, and the longest that training may be held, where the server is away for longer.
_DURABLE_SECONDS, _STALL_SECONDS = 4.0, 3.0
#: What ``committer`` adds to a save's deadline before its thread is given up.
_GRACE_SECONDS = 10.0


@pytest.fixture(scope="module", params=["3", "4.2"], ids=["v3", "v4.2"])
def machines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with running(tmp_path_factory.mktemp("nfs"), request.param) as machines:
        yield machines


@dataclass
class Trainers:
    """The trainers of one run directory, and what they have acknowledged to the host."""

    machines: Machines
    name: str
    scenario: str
    newest: int = 0
    in_flight: int = 0

    @property
    def acknowledged(self) -> int:
        return max((int(ack.name) for ack in (self.machines.folder / self.name).iterdir()), default=0)

    def start(self) -> None:
        (self.machines.folder / self.name).mkdir(exist_ok=True)
        self.machines.client.call(
            "start_trainer", path=f"/run/a/{self.name}", scenario=self.scenario, newest=self.newest, acks=self.name
        )

    def progress(self) -> None:
        """Until the trainer has one more acknowledged."""
        before, deadline = self.acknowledged, time.monotonic() + _PATIENCE_SECONDS
        while self.acknowledged <= before:
            assert time.monotonic() < deadline, "the trainer does not get on"
            time.sleep(0.02)

    def check(self) -> None:
        """By a mount of its own, which has nothing in its cache."""
        durable = max(self.acknowledged, self.newest)
        point = self.machines.mount("/run/check")
        names = self.machines.client.run("find", point, "-path", f"{point}/{self.name}/.tmp-0*", "-prune", "-print")
        self.in_flight += bool(names)
        visible = self.machines.client.call("visible", path=f"{point}/{self.name}")
        self.machines.client.run("umount", point)
        self.newest = max(visible.values(), default=0)
        assert self.newest >= durable, f"{durable} was acknowledged, {self.newest} is the newest left"


def _trainers(machines: Machines, crash: str) -> list[Trainers]:
    return [Trainers(machines, f"{crash}-{name}", name) for name in SCENARIOS if name != "overwrite"]


def test_a_server_that_stops_for_a_moment_costs_no_save(machines: Machines) -> None:
    path = "/run/a/moment"
    machines.client.call("start_training", path=path, options={})
    for _ in range(count("NFS_STOPS", 3)):
        _steps(machines, 20)
        machines.server.run("rpc.nfsd", "0")
        time.sleep(1.0)
        machines.start_serving()
        _saved(machines, path)
    trained = machines.client.call("training", end=True)
    assert not trained["errors"] + trained["untyped"]
    print(f"NFS v{machines.version}: {trained}")


def test_training_goes_on_while_the_server_is_away(machines: Machines) -> None:
    path = "/run/a/away"
    machines.client.call(
        "start_training",
        path=path,
        options={"durable_timeout_seconds": _DURABLE_SECONDS, "stall_timeout_seconds": _STALL_SECONDS},
    )
    _saved(machines, path)
    machines.server.run("rpc.nfsd", "0")
    deadline = time.monotonic() + _DURABLE_SECONDS + _GRACE_SECONDS + _PATIENCE_SECONDS
    while not any("SaveAbandoned" in one for one in machines.client.call("training")["errors"]):
        assert time.monotonic() < deadline, "a save on a server that is away is not given up"
        time.sleep(0.1)
    steps = machines.client.call("training")["steps"]
    machines.start_serving()
    _steps(machines, 1, since=steps)
    _saved(machines, path)
    trained = machines.client.call("training", end=True)
    assert not trained["untyped"], "an error that is not the package's own reached training"
    assert trained["longest_seconds"] < _STALL_SECONDS + 5, "training stood still"
    machines.client.call("visible", path=path)
    print(f"NFS v{machines.version}: {trained}")


def test_a_server_that_loses_its_power_loses_nothing_acknowledged(
    machines: Machines,
) -> None:
    rng, trainers = random.Random(machines.version), _trainers(machines, "server")
    crashes = count("NFS_SERVER_CRASHES", 14)
    for number in range(crashes):
        run = trainers[number % len(trainers)]
        run.start()
        run.progress()
        time.sleep(rng.uniform(0.0, 1.5))
        machines.server.kill()
        if rng.random() < 0.5:  # the client's kernel alone has what was not written yet; the trainer is gone
            machines.client.call("kill_trainer")
            machines.start_server()
        else:  # it waits for the server, and goes on
            machines.start_server()
            run.progress()
            machines.client.call("kill_trainer")
        assert machines.client.call("bury_trainer"), "the trainer ended by itself"
        run.check()
    print(f"NFS v{machines.version}: {crashes} power losses of the server, {_sum(trainers)}")


def test_two_machines_that_lose_their_power_lose_nothing_acknowledged(
    machines: Machines,
) -> None:
    rng, trainers = random.Random(machines.version), _trainers(machines, "both")
    crashes = count("NFS_CRASHES", 4)
    for number in range(crashes):
        run = trainers[number * 3 % len(trainers)]
        run.start()
        run.progress()
        time.sleep(rng.uniform(0.0, 1.5))
        for guest in rng.sample([machines.server, machines.client], 2):
            guest.kill()
        machines.start()
        run.check()
    print(f"NFS v{machines.version}: {crashes} power losses of both machines, {_sum(trainers)}")


def test_a_server_that_confirms_what_it_has_not_written_is_caught(machines: Machines) -> None:
    """Were it not, the tests above would show nothing."""
    run = Trainers(machines, "async", "safetensors")
    machines.export = "async"
    machines.server.kill()
    machines.start_server()
    with pytest.raises(AssertionError, match=r"was acknowledged, \d+ is the newest left|visible and damaged|torn and"):
        for _ in range(10):
            run.start()
            run.progress()
            machines.server.kill()
            machines.client.call("kill_trainer")
            machines.start_server()
            machines.client.call("bury_trainer")
            run.check()


def _sum(trainers: list[Trainers]) -> str:
    return (
        f"{sum(run.in_flight for run in trainers)} with a save in flight, {sum(run.newest for run in trainers)} saves"
    )


def _steps(machines: Machines, number: int, since: int | None = None) -> None:
    began = machines.client.call("training")["steps"] if since is None else since
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while machines.client.call("training")["steps"] < began + number:
        assert time.monotonic() < deadline, "training does not go on"
        time.sleep(0.05)


def _saved(machines: Machines, path: str) -> None:
    """Until there is a newer checkpoint than now."""

    def newest() -> str:
        with contextlib.suppress(CallFailed):
            return machines.client.run("sh", "-c", f"ls -d {path}/step-* | tail -n 1")
        return ""

    before, deadline = newest(), time.monotonic() + _PATIENCE_SECONDS
    while newest() <= before:
        assert time.monotonic() < deadline, "nothing is saved any more"
        time.sleep(0.1)
