"""Checks and planted bugs of frozen files that several ranks write: see ``ranks/test_mutants.py``."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import asyncckpt
from asyncckpt.ranks import collective_save as together
from asyncckpt.ranks.shared_files import HeldBack
from asyncckpt.ranks.store import RankStore
from asyncckpt.storage.pending_dir import LocalPendingDirectory
from asyncckpt.write.progress import ShardProgress
from asyncckpt.write.shards import ShardPipeline
from asyncckpt.write.unchanged import Unchanged
from support.fault_points import checkpointer, state_of
from support.harness import Fault, Me

Patch = pytest.MonkeyPatch
_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def saved(run: asyncckpt.Checkpointer, step: int, state: Any = None) -> str:
    """The class of what a save ended with; empty where it was acknowledged."""
    try:
        error = run.save(step, state or state_of(step)).exception(30)
    except asyncckpt.AsyncCkptError as raised:
        error = raised
    return type(error).__name__ if error is not None else ""


class _Base:
    """A frozen matrix of which each rank holds rows, and a count that changes at every save."""

    def __init__(self, me: Me, path: str) -> None:
        self.rank = me.rank
        self.run, self.ops = checkpointer(me, f"{path}-own")
        self.module = torch.nn.Module()
        mesh = init_device_mesh("cpu", (me.size,))
        rows = distribute_tensor(torch.ones(3000, 100), mesh, [Shard(0)])
        self.module.base = torch.nn.Parameter(rows, requires_grad=False)
        self.rows = self.module.base.to_local()  # type: ignore[operator]
        self.wrong: list[str] = []

    def save(self, step: int) -> str:
        error = saved(self.run, step, {"model": self.module, "count": {"step": step}})
        self.run.wait() if not error else None
        dist.barrier()
        return error

    def check(self, step: int) -> list[str]:
        """Save; return what is not stored as this rank has it."""
        if error := self.save(step):
            return [f"step {step}: {error}"]
        if damage := self.run.verify(step):
            return [f"step {step}: {damage[0]}"]
        stored = self.run.load_tensors(step, ["model"])["model.base"]
        begin = 1000 * self.rank
        equal = torch.equal(stored[begin : begin + 1000], self.rows)
        return [] if equal else [f"step {step}: rows of another step"]


def _frozen(me: Me, path: str) -> list[str]:
    """One rank alone changes what should never change."""
    base = _Base(me, path)
    wrong = base.check(1)
    if me.rank == 1:
        base.rows[5] = 2.0
    wrong += base.check(2) + base.check(3)
    base.run.close()
    return wrong


def _learned_late(me: Me, path: str) -> list[str]:
    """A rank compares with an older checkpoint than rank 0, from which it has not changed."""
    base = _Base(me, path)
    wrong = base.check(1)
    if me.rank == 1:
        base.rows[5] = 2.0
        base.run._reuse.learn = lambda *_: None  # type: ignore[method-assign]
    wrong += base.check(2)
    if me.rank == 1:
        base.rows[5] = 1.0
    wrong += base.check(3)
    base.run.close()
    return wrong


def _asked(me: Me, path: str) -> list[str]:
    """A rank is to write what it had held back, and cannot: nobody acknowledges the save."""
    base = _Base(me, path)
    wrong = base.check(1)
    if me.rank == 1:
        base.rows[5] = 2.0
    read = base.run._coordinator.ranks.read  # type: ignore[union-attr]

    def reading(*args: Any) -> Any:
        body = read(*args)
        base.ops.armed = isinstance(body, dict) and "write" in body
        return body

    base.run._coordinator.ranks.read = reading  # type: ignore
    if not base.save(2):
        wrong.append("step 2 failed on a rank and was acknowledged here")
    base.ops.armed = False
    base.run.close()
    return wrong


def a_ranks_change_is_ignored(patch: Patch) -> None:
    real = ShardProgress.equal
    patch.setattr(ShardProgress, "equal", lambda *args: dist.get_rank() == 1 or real(*args))


def one_ranks_answer_stands_for_all(patch: Patch) -> None:
    """What one rank has not changed, no rank has; whose bytes come first stay."""
    the_manifest_is_not_asked(patch)
    real = together.link_unchanged

    def link(save: Any, reports: Any, files: Any) -> Any:
        held = {name for report in reports for name in report["held_back"]}
        for report in reports:
            report["held_back"] = sorted(held & {row["name"] for row in report["files"]})
        return real(save, reports, files)

    def taken_over(self: LocalPendingDirectory, source: Any, file: str, nbytes: int, name: str) -> bool:
        if os.path.exists(os.path.join(self.path, name)):
            os.unlink(os.path.join(self.path, name))
        os.link(os.path.join(source.path, file), os.path.join(self.path, name))
        return True

    patch.setattr(together, "link_unchanged", link)
    patch.setattr(LocalPendingDirectory, "link", taken_over)


def what_is_held_back_is_not_asked_for(patch: Patch) -> None:
    patch.setattr(together, "link_unchanged", lambda *_: HeldBack({}, frozenset(), 0))


def ranks_write_nothing_when_asked(patch: Patch) -> None:
    patch.setattr(ShardPipeline, "write_held_back", lambda *_, **__: None)


def second_reports_are_not_waited_for(patch: Patch) -> None:
    real = RankStore.gather

    def gather(self: RankStore, *args: Any, ranks: Any = None) -> list[Any]:
        return real(self, *args) if ranks is None else [None] * self.size

    patch.setattr(RankStore, "gather", gather)


def a_second_failure_is_taken_for_success(patch: Patch) -> None:
    real = RankStore.gather

    def gather(self: RankStore, *args: Any, ranks: Any = None) -> list[Any]:
        found = real(self, *args, ranks=ranks)
        return found if ranks is None else [None if one is None else {"error": None} for one in found]

    patch.setattr(RankStore, "gather", gather)


def the_manifest_is_not_asked(patch: Patch) -> None:
    """Whether the file of the checkpoint before is what the ranks have compared with is not looked at."""

    def link(self: Unchanged, record: Any, directory: Any) -> bool:
        return bool(directory.link(self._previous.reader, record.name, record.nbytes, record.name))  # type: ignore

    patch.setattr(Unchanged, "link_shared", link)


CHECKS: dict[str, tuple[Callable[..., list[str]], Fault | None]] = {
    "frozen": (_frozen, None),
    "learned late": (_learned_late, None),
    "asked and failed": (_asked, Fault(2, "write", "raise", error=_FULL)),
}
MUTANTS: list[tuple[Callable[[Patch], None], str]] = [
    (a_ranks_change_is_ignored, "frozen"),
    (one_ranks_answer_stands_for_all, "frozen"),
    (what_is_held_back_is_not_asked_for, "frozen"),
    (ranks_write_nothing_when_asked, "frozen"),
    (second_reports_are_not_waited_for, "asked and failed"),
    (a_second_failure_is_taken_for_success, "asked and failed"),
    (the_manifest_is_not_asked, "learned late"),
]
