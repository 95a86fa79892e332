"""A rank can be struck during a save at these points: ``stage``, ``write``, ``fsync``, ``report``, ``publish``."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

import asyncckpt
from asyncckpt.events import Event, ExtentStaged
from asyncckpt.ranks import collective_save as together
from asyncckpt.storage.posix import PosixOps
from asyncckpt.types import Buffer
from support.harness import Me
from support.options import by_stage

#: Ranks wait this long for each other here.
TIMEOUT_SECONDS = 2.0
#: Other ranks wait this much longer until they take rank 0 for lost; the library's own grace is 15 s.
GRACE_SECONDS = 1.0
#: A rank learns in this time at most that another is lost: rank 0's patience, then the grace, and scheduling.
BOUND_SECONDS = 2 * TIMEOUT_SECONDS + GRACE_SECONDS + 8.0
#: No ``save`` or ``step`` may keep training for longer. They take milliseconds; the documented limits are far above.
CALL_SECONDS = 2.0


class PointOps(PosixOps):
    """Makes points of system calls. Nothing happens before ``armed``."""

    def __init__(self, me: Me) -> None:
        self.me = me
        self.armed = False

    def at(self, point: str) -> None:
        if self.armed:
            self.me.at(point)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        self.at("write")
        return super().pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        self.at("fsync")
        super().fsync(fd)

    def rename_noreplace(self, source: str, target: str) -> None:
        if "/.tmp-" in source:
            self.at("publish")
        super().rename_noreplace(source, target)


def checkpointer(me: Me, path: str, **options: Any) -> tuple[asyncckpt.Checkpointer, PointOps]:
    """Make a checkpointer whose points are the rank's; arm it with ``ops.armed = True``."""
    together._GRACE_SECONDS = GRACE_SECONDS
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()  # the ranks' processes may have started seconds apart, and what follows is bounded
    ops = PointOps(me)

    def staged(event: Event) -> None:
        if isinstance(event, ExtentStaged):
            ops.at("stage")

    ranks = asyncckpt.RankOptions(timeout_seconds=TIMEOUT_SECONDS)
    run = asyncckpt.Checkpointer(path, **by_stage(ranks=ranks, on_event=staged, extent_bytes=256 << 10, **options))
    run._store.ops = ops
    run._join()
    if run._coordinator is not None:
        post = run._coordinator.ranks.post

        def posting(key: str, body: Any) -> None:
            if key.startswith("save/") and not key.endswith("outcome") and "/replan/" not in key:
                ops.at("report")
            post(key, body)

        run._coordinator.ranks.post = posting  # type: ignore[method-assign]
    return run, ops


def state_of(step: int) -> dict[str, Any]:
    """Make a state that says in every byte which step it belongs to. It is large enough to be divided among ranks, with
    a tensor for each of three."""
    return {
        "w": torch.full((1 << 20,), float(step)),
        "b": torch.full((17,), step),
        "c": torch.full((23,), step),
        "meta": {"step": step},
    }


def is_whole(path: str, *, lowest: int = 0) -> int:
    """Check that what is visible is complete and holds the step that it says. Return the newest step, which must be at
    least ``lowest``."""
    run = asyncckpt.Run(path, direct=False)
    for entry in run.ls():
        assert entry.damage is None, f"torn and visible: {entry}"
        assert run.verify(entry.step) == [], f"damaged and visible: {entry}"
    newest = max((entry.step for entry in run.ls()), default=0)
    assert newest >= lowest, f"step {lowest} was acknowledged and {newest} is the newest left"
    if newest:
        state = state_of(-1)
        assert run.restore(state).step == newest
        assert state["meta"] == {"step": newest}
        assert bool((state["w"] == newest).all())
        assert bool((state["b"] == newest).all())
        assert bool((state["c"] == newest).all())
    return newest


class Clock:
    """Remembers how long the longest call took."""

    def __init__(self) -> None:
        self.longest = 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.longest = max(self.longest, time.monotonic() - self._began)
