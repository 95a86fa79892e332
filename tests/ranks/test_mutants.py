"""Planted bugs of the protocol between ranks: each check passes without them and must see every one."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import frozen_base
from support.fault_points import checkpointer, is_whole, state_of
from support.frozen_base import saved
from support.harness import Crew, Crews, Fault, Me, Outcome

import asyncckpt
from asyncckpt.commit import publication
from asyncckpt.plan import partition as division
from asyncckpt.ranks import collective_save as together
from asyncckpt.ranks import merging, report_checks, reports, tables
from asyncckpt.ranks import planner as planning
from asyncckpt.ranks import store as distributed
from asyncckpt.ranks.collective_save import Leader
from asyncckpt.ranks.coordinator import Coordinator
from asyncckpt.ranks.store import RankStore
from asyncckpt.storage.posix import PosixOps

RANKS = 3


# -- checks: scenarios that return what is wrong on this rank ---------------------------------------------------------


def _plain(me: Me, path: str) -> list[str]:
    run, _ = checkpointer(me, path)
    wrong = [f"step {step}: {error}" for step in (1, 2) if (error := saved(run, step))]
    run.close()
    return wrong


def _struck(me: Me, path: str) -> list[str]:
    """One rank fails: nobody acknowledges the save."""
    run, ops = checkpointer(me, path)
    wrong = [f"step 1: {error}"] if (error := saved(run, 1)) else []
    ops.armed = True
    if not saved(run, 2):
        wrong.append("step 2 failed on a rank and was acknowledged here")
    ops.armed = False
    run.close()
    return wrong


def _odd(me: Me, path: str) -> list[str]:
    run, _ = checkpointer(me, path)
    wrong = [f"step 1: {error}"] if (error := saved(run, 1)) else []
    if (error := saved(run, 3 if me.rank == 1 else 2, state_of(2))) != "RanksDisagree":
        wrong.append(f"ranks save different steps: {error or 'acknowledged'}")
    run.close()
    return wrong


def _copies(me: Me, path: str) -> list[str]:
    run, _ = checkpointer(me, path, check_replicas=True)
    state = {"w": torch.full((300_000,), float(me.rank == 1))}
    wrong = [] if (error := saved(run, 1, state)) == "RanksDisagree" else [f"copies differ: {error or 'acknowledged'}"]
    run.close()
    return wrong


def _sampled(me: Me, path: str) -> list[str]:
    """Copies that differ are noticed by their sample alone."""
    run, _ = checkpointer(me, path)
    state = {"w": torch.full((300_000,), float(me.rank == 1))}
    wrong = [] if (error := saved(run, 1, state)) == "RanksDisagree" else [f"copies differ: {error or 'acknowledged'}"]
    run.close()
    return wrong


def _buffers(me: Me, path: str) -> list[str]:
    """Buffers that differ are no mistake, and come back as the first rank's."""
    run, _ = checkpointer(me, f"{path}-own")
    model = torch.nn.Module()
    model.register_buffer("seen", torch.full((900_000,), float(me.rank)))
    wrong = [f"buffers differ: {error}"] if (error := saved(run, 1, {"model": model})) else []
    if not wrong and run.load_tensors(1)["model.seen"].unique().tolist() != [0]:
        wrong.append("buffers of several ranks are mixed")
    run.close()
    return wrong


def _stages(me: Me, path: str) -> list[str]:
    """Each stage has a learning rate of its own, in the group of the same number."""
    run, _ = checkpointer(me, f"{path}-own")
    model = torch.nn.ModuleDict({f"stage{me.rank}": torch.nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0 + me.rank)
    state = {"model": model, "optimizer": optimizer}
    wrong = [f"stages: {error}"] if (error := saved(run, 1, state)) else []
    optimizer.param_groups[0]["lr"] = 0.0
    if not wrong:
        run.restore(state, step=1)
        if optimizer.param_groups[0]["lr"] != 1.0 + me.rank:
            wrong.append(f"lr of stage {me.rank} is {optimizer.param_groups[0]['lr']}")
    run.close()
    return wrong


def _uncaptured(me: Me, path: str) -> list[str]:
    """What one rank cannot capture, the others learn of it, and not of a rank that is late."""
    run, _ = checkpointer(me, path)
    error = saved(run, 1, {"w": torch.ones(3), "bad": object() if me.rank == 1 else 1})
    return [] if error == "UnsupportedValue" else [f"a rank could not capture its state: {error}"]


def _synced(me: Me, path: str) -> list[str]:
    """When a rank reports, everything that it wrote is on the disk."""
    run, ops = checkpointer(me, path, incremental=False)
    dirty: set[str] = set()
    wrong: list[str] = []

    def name(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    pwrite, fsync, post = type(ops).pwrite, type(ops).fsync, run._coordinator.ranks.post  # type: ignore[union-attr]

    def pwriting(fd: int, data: Any, offset: int) -> int:
        dirty.add(name(fd))
        return pwrite(ops, fd, data, offset)

    def fsyncing(fd: int) -> None:
        fsync(ops, fd)
        if PosixOps.fsync is _FSYNC:
            dirty.discard(name(fd))

    def posting(key: str, body: Any) -> None:
        if key.startswith("save/") and dirty:
            wrong.append(f"reported while {sorted(map(os.path.basename, dirty))} was not synced")
        post(key, body)

    ops.pwrite, ops.fsync, run._coordinator.ranks.post = pwriting, fsyncing, posting  # type: ignore
    wrong += [f"step 1: {error}"] if (error := saved(run, 1)) else []
    run.close()
    return wrong


def _again(me: Me, path: str) -> list[str]:
    """Processes that are started again, with the store of those before them."""
    wrong: list[str] = []
    for life in (1, 2):
        distributed._instances.clear()
        try:
            run, _ = checkpointer(me, path, takeover=life == 2)
            wrong += [f"life {life}: {error}"] if (error := saved(run, life)) else []
        except asyncckpt.AsyncCkptError as error:
            wrong.append(f"life {life}: {error}")
        dist.barrier()
        me.kept[f"life {life}"] = run
    return wrong


# -- planted bugs ----------------------------------------------------------------------------------------------------

_FSYNC = PosixOps.fsync
Patch = pytest.MonkeyPatch
_EMPTY = (
    {"error": None, "files": [], "held_back": [], "compared_with": "", "damaged": ""}
    | {
        key: {}
        for key in ("orders", "own", "trees", "aliases", "replicas", "sampled", "groups", "values", "descriptions")
    }
    | {"sample": "{}", "phases": [0.0, 0.0]}
)


def _no_wholeness(patch: Patch) -> None:
    """Whether the reports cover every byte is not looked at, nor whether a reader would take that."""
    patch.setattr(publication, "check_readable", lambda *_: None)
    real = together.merge_files

    def files(reports: Any, step: int) -> Any:
        for report in reports:
            for row in report["files"]:
                row["nbytes_claimed"] = row["nbytes"]
        try:
            return real(reports, step)
        except asyncckpt.SaveFailed:
            from asyncckpt.manifest.parse import extent_of
            from asyncckpt.manifest.records import FileRecord

            found: dict[str, list[Any]] = {}
            sizes: dict[str, int] = {}
            for report in reports:
                for row in report["files"]:
                    found.setdefault(row["name"], []).extend(row["extents"])
                    sizes[row["name"]] = row["nbytes"]
            return [
                FileRecord(name, sizes[name], tuple(extent_of(one) for one in sorted(map(tuple, extents))))
                for name, extents in found.items()
            ]

    patch.setattr(together, "merge_files", files)


def _gathering(patch: Patch, change: Callable[[Any, list[Any]], list[Any]], *, wait: bool) -> None:
    real = RankStore.gather

    def gather(self: RankStore, key: str, *args: Any, **options: Any) -> list[Any]:
        if not key.startswith("save/"):
            return real(self, key, *args, **options)
        found = [one.read() for one in real(self, key, *args[:2])] if wait else [None] * self.size
        return [SimpleNamespace(read=lambda one=one: one) for one in change(self, found)]

    patch.setattr(RankStore, "gather", gather)
    for module in (together, report_checks):
        patch.setattr(module, "mismatch", lambda _body, _draft: None)


def failures_are_taken_for_empty_parts(patch: Patch) -> None:
    _no_wholeness(patch)
    _gathering(patch, lambda _, found: [_EMPTY if one is None or one["error"] else one for one in found], wait=True)


def nobody_is_waited_for(patch: Patch) -> None:
    _no_wholeness(patch)
    _gathering(patch, lambda _, found: [dict(_EMPTY) for _ in found], wait=False)


def any_step_will_do(patch: Patch) -> None:
    for module in (together, report_checks):
        patch.setattr(module, "mismatch", lambda _body, _draft: None)


def ranks_acknowledge_their_own_part(patch: Patch) -> None:
    real = RankStore.read

    def read(self: RankStore, key: str, *args: Any, **options: Any) -> Any:
        if key.endswith("/outcome"):
            return {"error": None, "name": "step-00000002", "nbytes": 0}
        return real(self, key, *args, **options)

    patch.setattr(RankStore, "read", read)


def success_is_told_before_it_is_so(patch: Patch) -> None:
    real = Leader.publish

    def publish(self: Leader, *args: Any) -> Any:
        self._told = True
        together._try_post(
            self._rank_save, self._rank_save.outcome, {"error": None, "name": "step-00000002", "nbytes": 0}
        )
        return real(self, *args)

    patch.setattr(Leader, "publish", publish)


def parts_are_not_synced(patch: Patch) -> None:
    patch.setattr(PosixOps, "fsync", lambda _self, _fd: None)


def the_store_is_believed(patch: Patch) -> None:
    patch.setattr(distributed, "rendezvous", lambda *_: "always")


def every_rank_has_an_attempt_of_its_own(patch: Patch) -> None:
    patch.setattr(Coordinator, "attempt", lambda _self, _number: uuid.uuid4().hex)


def a_rank_forgets_an_extent(patch: Patch) -> None:
    _no_wholeness(patch)
    real = division.extents_of
    patch.setattr(division, "extents_of", lambda *args: list(real(*args))[: -1 if dist.get_rank() == 1 else None])


def two_ranks_think_they_are_the_same(patch: Patch) -> None:
    """Rank 2 writes rank 1's part."""
    _no_wholeness(patch)
    real = planning.divide
    patch.setattr(planning, "divide", lambda plan, held, rank, size: real(plan, held, min(rank, 1), size))


def copies_are_not_compared(patch: Patch) -> None:
    patch.setattr(report_checks, "_check_replicas", lambda *_: None)


def samples_are_not_compared(patch: Patch) -> None:
    patch.setattr(report_checks, "named", lambda *_: {})


def buffers_are_copies(patch: Patch) -> None:
    patch.setattr(tables, "_right_copies", lambda rows, _owner: rows)


def nothing_is_wrong_with_buffers_in_parts(patch: Patch) -> None:
    buffers_are_copies(patch)
    samples_are_not_compared(patch)


def groups_are_those_of_the_first_stage(patch: Patch) -> None:
    patch.setattr(merging, "_content", lambda *_: "{}")


def of_two_values_the_first_is_right(patch: Patch) -> None:
    real = reports.merge_trees
    patch.setattr(reports, "merge_trees", lambda name, _, *rest, **__: real(name, "module", *rest, first_is_right=True))


def a_rank_that_fails_early_tells_nobody(patch: Patch) -> None:
    patch.setattr(RankStore, "decline", lambda *_: None)


_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
_ON_RANK_2 = Fault(2, "write", error=_FULL)
_ON_RANK_0 = Fault(0, "publish", error=OSError(errno.EIO, os.strerror(errno.EIO)))
CHECKS: dict[str, tuple[Callable[..., list[str]], Fault | None]] = {
    "plain": (_plain, None),
    "a rank fails": (_struck, _ON_RANK_2),
    "publishing fails": (_struck, _ON_RANK_0),
    "different steps": (_odd, None),
    "different copies": (_copies, None),
    "sampled copies": (_sampled, None),
    "buffers": (_buffers, None),
    "stages": (_stages, None),
    "not captured": (_uncaptured, None),
    "synced": (_synced, None),
    "started again": (_again, None),
    **frozen_base.CHECKS,
}
MUTANTS: list[tuple[Callable[[Patch], None], str]] = [
    (failures_are_taken_for_empty_parts, "a rank fails"),
    (nobody_is_waited_for, "plain"),
    (any_step_will_do, "different steps"),
    (ranks_acknowledge_their_own_part, "a rank fails"),
    (ranks_acknowledge_their_own_part, "publishing fails"),
    (success_is_told_before_it_is_so, "publishing fails"),
    (parts_are_not_synced, "synced"),
    (the_store_is_believed, "started again"),
    (every_rank_has_an_attempt_of_its_own, "plain"),
    (a_rank_forgets_an_extent, "plain"),
    (two_ranks_think_they_are_the_same, "plain"),
    (copies_are_not_compared, "different copies"),
    (samples_are_not_compared, "sampled copies"),
    (buffers_are_copies, "buffers"),
    (nothing_is_wrong_with_buffers_in_parts, "buffers"),
    (groups_are_those_of_the_first_stage, "stages"),
    (of_two_values_the_first_is_right, "stages"),
    (a_rank_that_fails_early_tells_nobody, "not captured"),
    *frozen_base.MUTANTS,
]


def _with(me: Me, path: str, check: str, mutant: Callable[[Patch], None] | None) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        if mutant is not None:
            mutant(patch)
        return CHECKS[check][0](me, path)


def _problems(path: Path, check: str, mutant: Callable[[Patch], None] | None, crews: Crews) -> list[str]:
    """What a check sees: on the ranks, and of what is on the disk then."""
    crews.leave_room(RANKS)
    with Crew(RANKS) as crew:
        outcomes: list[Outcome] = crew.run(_with, str(path), check, mutant, fault=CHECKS[check][1], timeout=60)
    found = [text for one in outcomes for text in (one.value if one.ok else [one.message or one.trace or "silent"])]
    try:
        is_whole(str(path))
    except (AssertionError, asyncckpt.AsyncCkptError) as error:
        found.append(f"on the disk: {error}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_without_a_bug_nothing_is_seen(check: str, crews: Crews, tmp_path: Path) -> None:
    assert _problems(tmp_path / "run", check, None, crews) == []


@pytest.mark.slow
@pytest.mark.parametrize(("mutant", "check"), MUTANTS, ids=[f"{one.__name__}-{check}" for one, check in MUTANTS])
def test_a_planted_bug_is_seen(mutant: Callable[[Patch], None], check: str, crews: Crews, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)  # it can be planted: else the error of that would be taken for what is seen
    assert _problems(tmp_path / "run", check, mutant, crews), f"{mutant.__name__}: nobody noticed"
