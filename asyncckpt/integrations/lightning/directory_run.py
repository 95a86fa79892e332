"""All checkpoints that Lightning saves in one directory belong to one run, which lies in a folder of that directory."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Final

import torch

from asyncckpt.catalog.retention import Candidate
from asyncckpt.checkpointer import Checkpointer
from asyncckpt.commit.pending import PendingSave
from asyncckpt.errors import CheckpointNotFound
from asyncckpt.integrations.lightning.agreement import Savers
from asyncckpt.integrations.lightning.pointer import (
    Pointer,
    check_is_no_directory,
    link_to,
    read_pointer,
    write_pointer,
)
from asyncckpt.integrations.lightning.unchanged import fingerprint
from asyncckpt.ownership import RunOptions
from asyncckpt.run import Run

log = logging.getLogger("asyncckpt")

#: The folder of a run. A training that goes back to an earlier step than the run has reached gets a run of its own,
#: with a number at the end, so that no checkpoint takes another one's place.
FOLDER: Final = "asyncckpt-run"


class KeepUntilRemoved:
    """A retention policy that keeps what Lightning has not removed: the checkpoint that each name means. Thread-safe.

    A checkpoint goes once every name of it was removed, or means a later one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: By each name that was removed, the saves (step, name) that have to be durable before it goes.
        self._removed: dict[str, frozenset[tuple[int, str]]] = {}

    def remove(self, name: str, after: frozenset[tuple[int, str]]) -> None:
        """Let go of a name, once the saves ``after`` are there."""
        with self._lock:
            self._removed[name] = after

    def save(self, name: str) -> None:
        """Take note that a name is saved anew."""
        with self._lock:
            self._removed.pop(name, None)

    def has_removed(self) -> bool:
        """Return whether any name was removed."""
        with self._lock:
            return bool(self._removed)

    def keep(self, candidates: Sequence[Candidate]) -> set[int]:
        with self._lock:
            removed = dict(self._removed)
        names = [tuple(getattr(candidate, "names", ())) for candidate in candidates]
        there = {(one.step, name) for one, own in zip(candidates, names, strict=True) for name in own}
        means = {name: index for index, own in enumerate(names) for name in own}
        gone = {name for name, after in removed.items() if after <= there}
        return {
            candidate.step
            for index, (candidate, own) in enumerate(zip(candidates, names, strict=True))
            if not own or any(means[name] == index and name not in gone for name in own)
        }

    def describe(self) -> str:
        return "KeepUntilRemoved()"


class DirectoryRun:
    """The run of one directory, open for saving. For the training thread, unless a method says otherwise.

    ``directory``: where Lightning wants its files. ``options``: what ``Checkpointer`` is given. ``step``: the first
    one that is saved. ``savers``: who saves together; the first of them writes the files that name checkpoints. Blocks
    on the disk. Raises as ``Checkpointer.prepare`` does.
    """

    def __init__(self, directory: Path, options: Mapping[str, Any], step: int | None, savers: Savers) -> None:
        self.directory = directory
        self._savers = savers
        self.folder, self.reached = savers.by_first(lambda: _folder_for(directory, step))
        self._is_empty = self.reached < 0
        self._policy = KeepUntilRemoved()
        self._checkpointer = Checkpointer(
            directory / self.folder,
            ranks=savers.options,
            keep=self._policy,
            run=RunOptions(create_parents=True),
            **options,
        )
        self._watched: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        #: The last save: its step, the fingerprint of its state, its file.
        self._last: tuple[int, Any, Path, PendingSave] | None = None
        #: The files that are links to others. What was saved under the name before leaves such a file alone.
        self._links: set[Path] = set()
        #: Saves in flight, with their names.
        self._in_flight: dict[PendingSave, str] = {}

    def watch(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Let saves overlap training with these optimizers; see ``Checkpointer.watch``."""
        for optimizer in optimizers:
            if optimizer not in self._watched:
                self._watched.add(optimizer)
                self._checkpointer.watch(optimizer)

    def save(
        self,
        path: Path,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any],
        contents: Mapping[str, Any],
    ) -> None:
        """Save ``state`` and have the file ``path`` name it. Returns once training may go on; the first save of a run
        waits until it is durable. A ``last*`` of what was saved right before, as ``contents`` tell, becomes a link to
        that. Raises as ``Checkpointer.save`` does, and ``RunPathError`` where ``path`` is a directory."""
        name = path.name
        mark = fingerprint(contents)
        if self._last is not None and name.startswith("last") and self._last[0] == step:
            saved, pending = self._last[2:]
            if self._savers.all(self._last[1] == mark):
                self._savers.by_first(lambda: self._link(path, saved, pending))
                return
        self._savers.by_first(lambda: check_is_no_directory(path))
        problem: Exception | None = None
        try:  # what keeps one rank from saving must not leave the others waiting for it
            self._begin(path, step, state, metrics, mark)
        except Exception as error:
            problem = error
        self._savers.check(problem)

    def _begin(self, path: Path, step: int, state: Mapping[str, Any], metrics: Mapping[str, Any], mark: Any) -> None:
        name = path.name
        self._policy.save(name)
        self._links.discard(path)
        pending = self._checkpointer.save(step, state, metrics=metrics, name=name)
        self.reached = step
        self._last = (step, mark, path, pending)
        self._in_flight = {one: name for one, name in self._in_flight.items() if not one.done()}
        self._in_flight[pending] = name
        if self._is_empty:  # until then there is nothing that a training could resume from after a crash
            pending.result()
            self._is_empty = False
        if self._savers.leads:
            self._name(path, pending)

    def _name(self, path: Path, pending: PendingSave) -> None:
        """Have the file ``path`` name a save in flight, at once where there is no such file yet."""
        pointer = Pointer(self.folder, path.name)
        fresh = not path.exists() and not path.is_symlink()
        if fresh:
            write_pointer(path, pointer, durable=False)
        pending.add_done_callback(lambda done: self._settle(done, path, pointer, fresh))

    def _link(self, path: Path, saved: Path, pending: PendingSave) -> None:
        """Have the file ``path`` be a link to ``saved``, and let go of what was saved under its own name. Where that
        save fails, the file names what it named before."""
        if path == saved:
            return
        before = read_pointer(path)
        self._links.add(path)
        link_to(path, saved)
        self._policy.remove(path.name, frozenset({(pending.step, saved.name)}))
        pending.add_done_callback(lambda done: _unlink(done, path, saved, before))

    def _settle(self, pending: PendingSave, path: Path, pointer: Pointer, fresh: bool) -> None:
        """Once a save has ended, have the file name its checkpoint where it is durable, and take the file away again
        where the save was its first and has failed."""
        if path in self._links:
            return
        if not pending.failed():
            write_pointer(path, pointer, durable=True)
        elif fresh and read_pointer(path) == pointer:
            path.unlink(missing_ok=True)

    def in_flight(self) -> dict[PendingSave, str]:
        """Return the saves that have not ended, with their names."""
        return {pending: name for pending, name in self._in_flight.items() if not pending.done()}

    def remove(self, name: str, after: Mapping[PendingSave, str]) -> None:
        """Let the checkpoint of this name go, once the saves ``after`` are durable."""
        self._policy.remove(name, frozenset((pending.step, other) for pending, other in after.items()))

    def wait(self) -> None:
        """Block until every save has ended. Raises what failed in the background."""
        if self._checkpointer.unfinished():
            self._checkpointer.wait()

    def close(self) -> None:
        """Wait for every save, delete what was removed, and give the directory back. Raises what failed in the
        background."""
        try:
            self._checkpointer.wait()
            # what another rank was reading, to write what has not changed, was spared when it was to be deleted
            if self._policy.has_removed() or self._last is not None:
                self._checkpointer.prune()
        finally:
            self._checkpointer.close()


def _folder_for(directory: Path, step: int | None) -> tuple[str, int]:
    """Return the folder of the run that a save of ``step`` (None: of any) goes to, and the step that it has reached:
    -1 where there is no run yet."""
    folder, reached = FOLDER, -1
    for number in count(1):
        candidate = FOLDER if number == 1 else f"{FOLDER}-{number}"
        if not (directory / candidate).is_dir():
            if number == 1 or (step is not None and step < reached):
                return candidate, -1
            return folder, reached
        folder, reached = candidate, newest_step(directory / candidate)
    raise AssertionError("unreachable")


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint of a run; -1 where it has none."""
    try:
        return Run(run).newest().step
    except CheckpointNotFound:
        return -1


def _unlink(pending: PendingSave, path: Path, saved: Path, before: Pointer | None) -> None:
    """Where a save has failed, take back that the file ``path`` is a link to its file ``saved``."""
    if pending.failed() and path.is_symlink() and os.readlink(path) == saved.name:
        if before is not None:
            write_pointer(path, before, durable=False)
        else:
            path.unlink(missing_ok=True)
