"""Planted bugs: something that has to be synced is not, or too early."""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Callable
from typing import Any

from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.pending_dir import LocalPendingDirectory
from asyncckpt.storage.shard_file import LocalShardWriter
from asyncckpt.testing import RecordingOps
from faults.mutant_checks import LARGE, MADE, ONE, PARENTS, REFLINKS, RENAMED, TWO, ZARR
from faults.mutants.registry import Patch, around, deaf, mutant


@mutant("a shard is not synced", ONE, LARGE)
def _(patch: Patch) -> None:
    def finish(original: Any, self: LocalShardWriter, nbytes: int) -> None:
        real = self._ops
        self._ops = types.SimpleNamespace(truncate=real.truncate, fsync=lambda _: None, close=real.close)  # type: ignore
        original(self, nbytes)

    around(patch, LocalShardWriter, "finish", finish)


@mutant("a shard is synced before it is cut to size", LARGE)
def _(patch: Patch) -> None:
    def finish(self: LocalShardWriter, nbytes: int) -> None:
        self._ops.fsync(self._fd)
        self._ops.truncate(self._fd, nbytes)
        fd, self._fd = self._fd, -1
        self._ops.close(fd)

    patch.setattr(LocalShardWriter, "finish", finish)


@mutant("a shard is synced before its last write", ONE)
def _(patch: Patch) -> None:
    def write(original: Any, self: LocalShardWriter, view: memoryview, offset: int) -> None:
        self._ops.fsync(self._fd)
        original(self, view, offset)

    def finish(self: LocalShardWriter, nbytes: int) -> None:
        fd, self._fd = self._fd, -1
        self._ops.close(fd)

    around(patch, LocalShardWriter, "_write", write)
    patch.setattr(LocalShardWriter, "finish", finish)


def _unsynced_file(chosen: Callable[[str], bool]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        def write_file(original: Any, self: RecordingOps, path: str, data: bytes) -> None:
            if not chosen(path):
                return original(self, path, data)
            fd = self.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            self.pwrite(fd, data, 0)
            return self.close(fd)

        around(patch, RecordingOps, "_write_file", write_file)  # what the double does for ``write_file``

    return apply


mutant("small files are not synced", ONE)(_unsynced_file(lambda path: path.endswith("state.json")))
mutant("the manifest is not synced", ONE)(_unsynced_file(lambda path: path.endswith("manifest.json")))
mutant("a reflink is not synced", REFLINKS)(_unsynced_file(lambda path: "still-" in path))


@mutant("the attempt's directories are not synced", ONE, ZARR)
def _(patch: Patch) -> None:
    patch.setattr(LocalPendingDirectory, "sync_directory", lambda self: None)


@mutant("nested directories are not synced", ZARR)
def _(patch: Patch) -> None:
    patch.setattr(LocalPendingDirectory, "sync_directory", lambda self: self._store.ops.fsync_directory(self.path))


@mutant("the directory is not synced after the manifest", ONE)
def _(patch: Patch) -> None:
    def sync(original: Any, self: LocalPendingDirectory) -> None:
        if not os.path.exists(os.path.join(self.path, "manifest.json")):
            original(self)

    around(patch, LocalPendingDirectory, "sync_directory", sync)


@mutant("the parent is not synced after the rename", ONE, TWO)
def _(patch: Patch) -> None:
    def publish(original: Any, self: LocalPendingDirectory, name: str, *, replace: bool) -> None:
        with deaf(self._store, "fsync_directory"):
            original(self, name, replace=replace)

    around(patch, LocalPendingDirectory, "publish", publish)


@mutant("parents that were made are not synced", PARENTS)
def _(patch: Patch) -> None:
    def make(self: LocalStore, path: str) -> None:
        missing = []
        while not os.path.lexists(path):
            missing.append(path)
            path = os.path.dirname(path)
        for made in reversed(missing):
            self.ops.mkdir(made)

    patch.setattr(LocalStore, "_make_durable", make)


@mutant("a run directory that is there is taken for durable", MADE)
def _(patch: Patch) -> None:
    def make(self: LocalStore, path: str) -> None:
        with contextlib.suppress(FileExistsError):
            self.ops.mkdir(path)
            self.ops.fsync_directory(os.path.dirname(path))

    patch.setattr(LocalStore, "_make_durable", make)


@mutant("what a killed run left visible is taken for durable", RENAMED)
def _(patch: Patch) -> None:
    def reclaim(original: Any, self: LocalStore) -> list[str]:
        with deaf(self, "fsync_directory"):
            found: list[str] = original(self)
        return found

    around(patch, LocalStore, "reclaim", reclaim)
