"""These programs, whose every crash state is checked, make small runs on a recording file system."""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncckpt import Checkpointer, KeepLast, Run, WriterOptions
from asyncckpt.catalog.retention import Policy
from asyncckpt.commit.pending import PendingSave, SaveReport
from asyncckpt.errors import AsyncCkptError, CheckpointNotFound
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.restore.restore import load_tensors, restore
from asyncckpt.storage import shard_file
from asyncckpt.testing import CrashModel, RecordingOps, Recovery, Trace, permitted
from asyncckpt.testing.recovery import Saved
from support.options import by_stage

RUN = "run"
Program = Callable[["Saver"], None]


def state_of(step: int, version: int = 0, shards: int = 2) -> dict[str, Any]:
    """Make a state. Each shard's bytes say which step and version they belong to; the last shard never changes. No byte
    of the data is zero, as a hole would look right then."""
    value = 1 + 7 * step + 31 * version
    state: dict[str, Any] = {
        f"w{n}": torch.full((1100,), value + n / 8, dtype=torch.float32) + 0.001 for n in range(shards - 1)
    }
    state["still"] = torch.arange(1, 1101, dtype=torch.float32) + 0.001
    state["meta"] = {"step": step, "version": version}
    return state


def _bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@dataclass
class Saver:
    """Saves steps of a run on ``ops`` and marks what is acknowledged."""

    path: Path
    ops: RecordingOps
    options: dict[str, Any]
    threads: int = 2
    shards: int = 2
    run: Checkpointer | None = None
    versions: dict[int, int] = field(default_factory=dict)

    def open(self, **options: Any) -> Checkpointer:
        run = Checkpointer(
            self.path,
            **by_stage(**{"writer": WriterOptions(threads=self.threads), "shard_bytes": 4096} | self.options | options),
        )
        run._store.ops = self.ops
        self.run = run
        return run

    def save(self, step: int, *, wait: bool = True, **given: Any) -> None:
        run = self.run or self.open()
        version = self.versions[step] = self.versions.get(step, -1) + 1
        pending = run.save(step, state_of(step, version, self.shards), **given)
        if wait:
            pending.result()

    def go_back(self, step: int) -> None:
        """Restore the whole state of an earlier step, which gives up what was saved later."""
        run = self.run or self.open()
        run.restore(state_of(-1, 0, self.shards), step)

    def close(self) -> None:
        """Wait for everything, retention included, and give the directory back."""
        run, self.run = self.run, None
        if run is not None:
            run.close()

    def killed(self) -> None:
        """Act as after a kill: the next process opens the directory."""
        run, self.run = self.run, None
        if run is not None:
            with contextlib.suppress(Exception):
                run.close()
        self.ops.revive()


def _marking(
    saver: Saver, resolve: Callable[[PendingSave, SaveReport], None]
) -> Callable[[PendingSave, SaveReport], None]:
    """Mark the acknowledgement at the very moment it happens."""

    def marked(self: PendingSave, report: SaveReport) -> None:
        saver.ops.mark("acknowledged", self.step, saver.versions[self.step])
        resolve(self, report)

    return marked


@dataclass(frozen=True)
class Scenario:
    """A scenario is a program and its options. ``steps`` says what ``program`` may have saved, and how often."""

    name: str
    program: Program
    steps: dict[int, int]
    options: dict[str, Any] = field(default_factory=dict)
    threads: int = 2
    shards: int = 2
    policies: tuple[Policy, ...] = ()
    reflinks: bool = False
    run: str = RUN
    small_bytes: int | None = None
    #: A name that each step's last save gets: it is what is restored, once there is one that has it.
    moving: str | None = None

    def play(self, root: Path, ops: RecordingOps) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if self.small_bytes is not None:  # shards larger than this are reserved, written in parts and cut to size
                patch.setattr(shard_file, "_SMALL_BYTES", self.small_bytes)
            saver = Saver(root / self.run, ops, dict(self.options), self.threads, self.shards)
            patch.setattr(PendingSave, "resolve", _marking(saver, PendingSave.resolve))
            try:
                self.program(saver)
            finally:
                saver.close()

    def record(self, root: Path, **settings: Any) -> RecordingOps:
        """Run the program once in a directory of its own."""
        place = root / uuid.uuid4().hex
        place.mkdir()
        ops = RecordingOps(str(place), reflinks=self.reflinks)
        for name, value in settings.items():
            setattr(ops, name, value)
        self.play(place, ops)
        return ops

    def permitted(self, root: Path, quiet: float = 0.1) -> Trace:
        """Return a trace with the order that the code guarantees."""

        def fresh() -> RecordingOps:
            place = root / uuid.uuid4().hex
            place.mkdir()
            return RecordingOps(str(place), reflinks=self.reflinks)

        return permitted(lambda ops: self.play(Path(ops.root), ops), fresh, quiet)

    def recovery(self, trace: Trace, **model: Any) -> Recovery:
        return Recovery(CrashModel(trace, **model), self.run, self.identify, self.restore, self.policies)

    def identify(self, checkpoint: OpenCheckpoint, step: int) -> Saved | None:
        """Return which save a checkpoint holds, bit for bit, tensors and plain values; None for anything else."""
        if checkpoint.assets() != self.options.get("assets", {}):
            return None
        found = {name.removesuffix(".value"): data for name, data in _bits(load_tensors(checkpoint, None)).items()}
        for version in range(self.steps.get(step, 0)):
            expected = state_of(step, version, self.shards)
            plain = {"meta": {}}
            restore(checkpoint, plain)
            if plain["meta"] == expected.pop("meta") and found == _bits(expected):
                return step, version
        return None

    def restore(self, run: Run) -> int:
        state = state_of(-1, 0, self.shards)
        if self.moving is not None:
            with contextlib.suppress(CheckpointNotFound):
                return run.restore(state, self.moving).step
        return run.restore(state).step


def _two_saves(saver: Saver) -> None:
    saver.save(1)
    saver.save(2)


def _named(saver: Saver) -> None:
    saver.save(1, name="epoch=1")
    saver.save(1, name="last")
    saver.save(2, name=["epoch=2", "last"])


def _overwritten(saver: Saver) -> None:
    saver.save(1)
    saver.save(1)


def _gone_back(saver: Saver) -> None:
    for step in (1, 2, 3):
        saver.save(step)
    saver.go_back(1)
    saver.save(2)


def _gone_back_then_killed(saver: Saver) -> None:
    """Kill when the step that is saved again had made way, and the new one had not got its name."""
    saver.save(1)
    saver.save(2)
    saver.go_back(1)
    saver.ops.kill_after = lambda event: event.kind == "rename" and ".replaced-" in event.target
    with contextlib.suppress(AsyncCkptError):
        saver.save(2)
    saver.killed()
    saver.versions[2] -= 1  # the killed save was never acknowledged
    saver.save(3)


def _linked(saver: Saver) -> None:
    """Save without waiting, so that what does not change is taken over from saves that retention deletes meanwhile."""
    for step in (1, 2, 3):
        saver.save(step, wait=step == 2)


def _published_then_killed(saver: Saver) -> None:
    """Kill between the rename and its sync; the next process sees the checkpoint, and prunes by it."""
    saver.save(1)
    saver.ops.kill_after = lambda event: event.kind == "rename" and event.target.endswith("step-00000002")
    with contextlib.suppress(AsyncCkptError):
        saver.save(2)
    saver.killed()
    saver.open(keep=KeepLast(1)).prune()


def _made_then_killed(saver: Saver) -> None:
    """Kill when the run directory was made and not durable; the next process finds it there."""
    saver.ops.kill_after = lambda event: event.kind == "mkdir" and event.path.endswith(RUN)
    with contextlib.suppress(AsyncCkptError):
        saver.save(1)
    saver.killed()
    saver.save(1)


def killed_anywhere(after: int) -> Program:
    """Make a program that is killed after so many events of a second save; the next process saves the next step,
    keeping one."""

    def program(saver: Saver) -> None:
        saver.save(1)
        seen = itertools.count(1)
        saver.ops.kill_after = lambda _event: next(seen) >= after
        with contextlib.suppress(AsyncCkptError):
            saver.save(2)
        saver.killed()
        saver.open(keep=KeepLast(1))
        saver.save(3)

    return program


SCENARIOS = [
    Scenario("one save", lambda saver: saver.save(1), {1: 1}),
    Scenario("two saves, retention", _two_saves, {1: 1, 2: 1}, {"keep": KeepLast(1)}, policies=(KeepLast(1),)),
    Scenario(
        "assets, and a name that moves",
        _named,
        {1: 2, 2: 1},
        {"keep": KeepLast(1), "assets": {"config.json": b"{}", "a/b.txt": b"beside"}},
        policies=(KeepLast(1),),
        moving="last",
    ),
    Scenario("a step saved again", _overwritten, {1: 2}, {"overwrite": True}),
    Scenario("a step saved again after going back", _gone_back, {1: 1, 2: 2, 3: 1}),
    Scenario("killed while a step made way", _gone_back_then_killed, {1: 1, 2: 2, 3: 1}),
    Scenario("parents made", lambda saver: saver.save(1), {1: 1}, {"create_parents": True}, run="a/b/run"),
    Scenario("links and retention", _linked, {1: 1, 2: 1, 3: 1}, {"keep": KeepLast(1)}, policies=(KeepLast(1),)),
    Scenario("large shards", _two_saves, {1: 1, 2: 1}, {"extent_bytes": 4096}, small_bytes=0),
    Scenario("reflinks", _two_saves, {1: 1, 2: 1}, reflinks=True),
    Scenario("killed after the rename, then pruned", _published_then_killed, {1: 1, 2: 1}),
    Scenario("killed when the run was made", _made_then_killed, {1: 2}),
    Scenario("zarr", _two_saves, {1: 1, 2: 1}, {"format": "zarr", "keep": KeepLast(1)}, policies=(KeepLast(1),)),
]
