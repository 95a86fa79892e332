"""What a save costs each rank: bytes staged, messages, and what the training thread does of it."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from support.fault_points import CALL_SECONDS, Clock, checkpointer, state_of
from support.harness import Crew, Crews, Fault, Me
from support.parallelisms import TIMEOUT

import asyncckpt
from asyncckpt.events import Event, ExtentStaged
from asyncckpt.ranks.announcements import LOOK_SECONDS
from asyncckpt.ranks.connection import JobMessages
from asyncckpt.storage.posix import PosixOps


def _staged(me: Me, path: str) -> int:
    """Bytes staged on this rank for a DDP model with its optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(500 + 37 * i, 500 + 37 * (i + 1)) for i in range(8)))
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if me.size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    staged: list[int] = []

    def count(event: Event) -> None:
        if isinstance(event, ExtentStaged):
            staged.append(event.nbytes)

    with asyncckpt.Checkpointer(path, ranks=TIMEOUT, on_event=count) as run:
        run.save(1, {"model": wrapped, "optimizer": optimizer}).result(60)
    return sum(staged)


def test_of_ddp_each_of_four_ranks_stages_a_quarter(crews: Crews, tmp_path: Path) -> None:
    whole = crews(1).values(_staged, str(tmp_path / "alone"))[0]
    found = crews(4).values(_staged, str(tmp_path / "run"))
    shares = [nbytes / whole for nbytes in found]
    assert all(0.25 * 0.95 <= share <= 0.25 * 1.05 for share in shares), shares
    assert 0.999 < sum(shares) < 1.001, "bytes are staged twice, or not at all"


class _Counting:
    """A store's connection that counts messages by kind and thread; a poll of ``check`` carries none."""

    def __init__(self, store: Any, counts: Counter[tuple[str, str]]) -> None:
        self._store = store
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in ("set", "get", "get_many", "check", "delete_key"):
            return found

        def call(*args: Any) -> Any:
            if name == "get_many" and not args[0]:
                return found(*args)
            where = "training" if threading.current_thread() is threading.main_thread() else "background"
            self._counts[name, where] += 1
            return found(*args)

        return call


def _messages(me: Me, path: str, saves: int) -> Any:
    """Store operations of this rank in steady state: after two saves, over ``saves`` more."""
    counts: Counter[tuple[str, str]] = Counter()
    with asyncckpt.Checkpointer(
        path, every=1, writer=asyncckpt.WriterOptions(reuse_unchanged=False), ranks=TIMEOUT
    ) as run:
        run._join()
        assert run._coordinator is not None
        run._coordinator.ranks._messages = cast("JobMessages", _Counting(run._coordinator.ranks._messages, counts))
        for step in range(1, saves + 3):
            if step == 3:
                run.wait()
                dist.barrier()
                counts.clear()
            pending = run.step(step, state_of(step))
            assert pending is not None
            pending.result(30)
        return dict(counts)


def test_a_steady_save_costs_a_rank_two_messages_and_the_training_thread_none(crews: Crews, tmp_path: Path) -> None:
    saves = 10
    found = crews(4).values(_messages, str(tmp_path / "run"), saves)
    for rank, counts in enumerate(found):
        assert not any(where == "training" for _, where in counts), f"rank {rank}: {counts}"
        sent, read = (counts.get((kind, "background"), 0) / saves for kind in ("set", "get"))
        if rank:
            assert sent + read <= 2, f"rank {rank}: {counts}"
        else:
            many = counts.get(("get_many", "background"), 0) / saves
            assert (sent, read) == (1, 0), f"one outcome: {counts}"
            assert 1 <= many <= 3, f"the reports of all other ranks, those that are there at once: {counts}"
            assert ("delete_key", "background") not in counts or counts["delete_key", "background"] <= 2 * saves


def _blocked(me: Me, path: str, every: Any) -> dict[str, Any]:
    """Train on while rank 0, which serves the job's store, stops."""
    run, _ = checkpointer(me, path, every=every)
    run.save(1, state_of(1)).result(30)
    dist.barrier()
    me.at("train")
    clock = Clock()
    errors: list[str] = []
    for step in range(2, 12):
        with clock:
            try:
                run.step(step, state_of(step))
            except asyncckpt.AsyncCkptError as error:
                errors.append(type(error).__name__)
    return {"longest": clock.longest, "errors": errors}


def test_a_stopped_rank_0_with_the_store_blocks_no_step(crews: Crews, tmp_path: Path) -> None:
    crews.leave_room(2)
    with Crew(2, store="rank0") as crew:
        fault = Fault(0, "train", "stop")
        other = crew.run(_blocked, str(tmp_path / "run"), asyncckpt.Steps(1000), fault=fault, timeout=60)[1]
    assert other.ok, other.trace or "training hangs"
    assert other.value["longest"] < CALL_SECONDS


def test_a_stopped_store_blocks_a_step_that_asks_for_the_time_no_longer_than_a_second(
    crews: Crews, tmp_path: Path
) -> None:
    crews.leave_room(2)
    with Crew(2, store="rank0") as crew:
        fault = Fault(0, "train", "stop")
        other = crew.run(_blocked, str(tmp_path / "run"), asyncckpt.Minutes(60), fault=fault, timeout=120)[1]
    assert other.ok, other.trace or "training hangs"
    assert other.value["longest"] < LOOK_SECONDS + CALL_SECONDS, other.value
    assert other.value["errors"] == [], "training goes on"


class _Calls(PosixOps):
    """Counts system calls by name."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name != "counts":
            self.counts[name] += 1
        return super().__getattribute__(name)


def _restoring(me: Me, path: str, checkpoints: int) -> dict[str, int]:
    """Count the calls of a restore in a run of so many checkpoints."""
    with asyncckpt.Checkpointer(path, keep=(), ranks=TIMEOUT) as run:
        for step in range(checkpoints):
            run.save(step, state_of(step)).result(60)
        run.wait()
    with asyncckpt.Checkpointer(path, keep=(), ranks=TIMEOUT) as run:
        calls = run._store.ops = _Calls()
        run.resume(state_of(-1))
        return dict(calls.counts)


def test_only_rank_0_looks_at_all_checkpoints(crews: Crews, tmp_path: Path) -> None:
    few, many = (crews(3).values(_restoring, str(tmp_path / f"run-{count}"), count) for count in (2, 8))
    assert sum(many[0].values()) > sum(few[0].values()), "rank 0 did not look either"
    for rank in (1, 2):
        assert many[rank] == few[rank], f"rank {rank} looks at checkpoints that it does not restore"
