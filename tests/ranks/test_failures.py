"""A rank that dies, stops or runs out of space at any stage: a typed error on the others in time, nothing published,
training goes on, and the next run finds everything in order."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.examples import thinned
from support.fault_points import BOUND_SECONDS, CALL_SECONDS, Clock, checkpointer, is_whole, state_of
from support.harness import Crew, Crews, Fault, Me, Outcome

import asyncckpt
from asyncckpt import NotEnoughSpace, SaveFailed


def _doomed(me: Me, path: str, options: dict[str, Any]) -> dict[str, Any]:
    """Save step 1; be struck in the save of step 2; go on training."""
    run, ops = checkpointer(me, path, **options)
    run.save(1, state_of(1)).result(30)
    dist.barrier()  # all know of step 1
    ops.armed = True
    clock = Clock()
    began = time.monotonic()
    with clock:
        pending = run.save(2, state_of(2))
    error = pending.exception(60)
    waited = time.monotonic() - began
    ops.armed = False
    for step in range(3, 53):
        with clock:
            run.step(step, state_of(step))
    run.close() if isinstance(error, NotEnoughSpace) else None  # else rank 0 would wait for the dead
    return {"error": [kind.__name__ for kind in type(error).__mro__], "message": str(error), "waited": waited} | {
        "longest": clock.longest
    }


def _next_run(me: Me, path: str, options: dict[str, Any]) -> int:
    run, _ = checkpointer(me, path, **options)
    state = state_of(-1)
    with run:
        resumed = run.resume(state)
        assert state["meta"]["step"] == resumed
        run.save(100, state_of(100)).result(30)
    return resumed


def _struck(fault: Fault, crews: Crews, path: Path, **options: Any) -> list[Outcome]:
    """What the survivors of three ranks say; then a run of two ranks goes on."""
    crews.leave_room(3)
    with Crew(3) as crew:
        outcomes = crew.run(_doomed, str(path), options, fault=fault, timeout=90)
        if fault.how == "stop":
            crew.wait_stopped(fault.rank)
    assert fault.how != "kill" or outcomes[fault.rank].gone, "it was not struck at all"
    survivors = [one for one in outcomes if fault.error is not None or one.rank != fault.rank]
    for one in survivors:
        assert one.ok, f"rank {one.rank}: {one.trace or 'no answer'}"
        assert one.value["waited"] < BOUND_SECONDS, one.value
        assert one.value["longest"] < CALL_SECONDS, f"training was blocked: {one.value}"
    assert is_whole(str(path), lowest=1) == 1, "a save that failed was published"
    assert set(crews(2).values(_next_run, str(path), options)) == {1}
    assert not [name for name in os.listdir(path) if name.startswith(".tmp-")], "litter was left"
    assert is_whole(str(path), lowest=100) == 100
    return survivors


#: The rest is slow: see below.
LOST = [
    Fault(1, "stage", "kill"),
    Fault(1, "write", "stop"),
    Fault(2, "report", "stop"),
    Fault(0, "write", "kill"),
    Fault(0, "publish", "kill"),
]


def _name(fault: Fault) -> str:
    return f"{fault.how}-rank{fault.rank}-{fault.point}"


@pytest.mark.parametrize("fault", LOST, ids=_name)
def test_a_rank_that_is_lost_ends_the_save_and_nothing_else(fault: Fault, crews: Crews, tmp_path: Path) -> None:
    for one in _struck(fault, crews, tmp_path / "run"):
        assert one.value["error"][0] == "RankLost", one.value
        assert f"rank {fault.rank}" in one.value["message"], one.value


PARTS = {"per_rank": True, "manifest_rows": 0}


@pytest.mark.parametrize("fault", [Fault(1, "report", "kill"), Fault(0, "publish", "kill")], ids=_name)
def test_a_rank_that_is_lost_after_it_wrote_its_part_of_the_manifest(
    fault: Fault, crews: Crews, tmp_path: Path
) -> None:
    for one in _struck(fault, crews, tmp_path / "run", **PARTS):
        assert one.value["error"][0] == "RankLost", one.value
        assert f"rank {fault.rank}" in one.value["message"], one.value


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("point", ["stage", "write", "fsync", "report", "publish"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_is_lost_at_every_stage_of_a_manifest_in_parts(
    rank: int, point: str, crews: Crews, tmp_path: Path
) -> None:
    if (point == "publish") != (rank == 0) and point in ("publish", "report"):
        pytest.skip("only rank 0 publishes, and only the others report")
    for one in _struck(Fault(rank, point, "kill"), crews, tmp_path / "run", **PARTS):
        assert one.value["error"][0] == "RankLost"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("form", ["safetensors/none", "zarr/none", "zarr/planes"])
@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("point", ["stage", "write", "fsync", "report", "publish"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_is_lost_at_every_stage(
    rank: int, point: str, how: str, form: str, crews: Crews, tmp_path: Path
) -> None:
    if (point == "publish") != (rank == 0) and point in ("publish", "report"):
        pytest.skip("only rank 0 publishes, and only the others report")
    kind, _, codec = form.partition("/")
    for one in _struck(Fault(rank, point, how), crews, tmp_path / "run", format=kind, codec=codec):
        assert one.value["error"][0] == "RankLost"


@pytest.mark.parametrize(("point", "rank"), thinned([("write", 0), ("write", 2), ("fsync", 0), ("fsync", 2)], 3))
def test_a_rank_without_space_says_so_on_all(rank: int, point: str, crews: Crews, tmp_path: Path) -> None:
    fault = Fault(rank, point, "raise", error=OSError(errno.ENOSPC, "No space left on device"))
    for one in _struck(fault, crews, tmp_path / "run"):
        assert one.value["error"][0] == "NotEnoughSpace", one.value
        assert one.value["waited"] < 5.0, "the others waited for a rank that had said why it failed"
        if rank and one.rank != rank:
            assert f"rank {rank}" in one.value["message"], one.value


def test_a_store_that_dies_with_rank_0_is_no_surprise(crews: Crews, tmp_path: Path) -> None:
    crews.leave_room(3)
    with Crew(3, store="rank0") as crew:
        outcomes = crew.run(_doomed, str(tmp_path / "run"), {}, fault=Fault(0, "write", "kill"), timeout=90)
    for one in outcomes[1:]:
        assert one.ok, one.trace
        assert one.value["error"][0] == "RankLost"
        assert one.value["longest"] < CALL_SECONDS
    assert is_whole(str(tmp_path / "run"), lowest=1) == 1


# -- late ranks ------------------------------------------------------------------------------------------------------


def _late(me: Me, path: str, again: int) -> dict[str, Any]:
    """Save step 1, step 2 in vain, and then step ``again``."""
    run, ops = checkpointer(me, path)
    run.save(1, state_of(1)).result(30)
    ops.armed = True
    first = run.save(2, state_of(-2)).exception(60)
    ops.armed = False
    second = run.save(again, state_of(again)).exception(60)
    return {"first": isinstance(first, SaveFailed), "second": second is None, "message": f"{first!r}, {second!r}"}


@pytest.mark.parametrize(("point", "again"), [("stage", 3), ("write", 2), ("report", 2)])
def test_a_late_rank_of_an_aborted_attempt_cannot_touch_a_newer_one(
    point: str, again: int, crews: Crews, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    crews.leave_room(3)
    with Crew(3) as crew:
        crew.start(_late, str(path), again, fault=Fault(1, point, "stop"))
        crew.wait_stopped(1)
        old, deadline = set[str](), time.monotonic() + 30
        while not old:  # the others may not have begun yet to write step 2
            assert time.monotonic() < deadline, "nobody writes step 2"
            time.sleep(0.005)
            old = _attempts(path)
        while not _attempts(path) - old:  # the others have given step 2 up and begun anew
            assert time.monotonic() < deadline, "the others do not begin anew in another directory"
            time.sleep(0.005)
        crew.signal(1, signal.SIGCONT)
        outcomes = crew.collect(60)
    assert all(one.ok for one in outcomes), [one.trace for one in outcomes]
    assert all(one.value["first"] and one.value["second"] for one in outcomes), outcomes
    assert is_whole(str(path), lowest=again) == again
    assert [entry.step for entry in asyncckpt.Run(path).ls()] == [1, again]


def _attempts(path: Path) -> set[str]:
    return {name for name in os.listdir(path) if name.startswith(".tmp-0")}


def test_a_late_rank_0_publishes_a_whole_checkpoint_or_none(crews: Crews, tmp_path: Path) -> None:
    path = tmp_path / "run"
    crews.leave_room(3)
    with Crew(3) as crew:
        crew.start(_doomed, str(path), {}, fault=Fault(0, "publish", "stop"))
        crew.wait_stopped(0)
        others = crew.collect(60, without=[0])
        assert [one.value["error"][0] for one in others[1:]] == ["RankLost"] * 2
        crew.signal(0, signal.SIGCONT)
        late = crew.collect(60, without=[1, 2])[0]
    assert late.ok, late.trace
    newest = is_whole(str(path), lowest=1)
    assert newest == (2 if late.value["error"][0] == "NoneType" else 1)
