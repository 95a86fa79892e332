"""Planted bugs: what storage or the background said went wrong is not heard."""

from __future__ import annotations

import contextlib
from typing import Any

from asyncckpt.commit.committer import Committer
from asyncckpt.storage.pending_dir import LocalPendingDirectory
from asyncckpt.storage.shard_file import LocalShardWriter
from asyncckpt.write.progress import ShardProgress
from asyncckpt.write.shards import ShardPipeline
from faults import mutant_checks as checks
from faults.mutants.registry import Patch, around, mutant


@mutant("a short write is ignored", checks.short_writes)
def _(patch: Patch) -> None:
    def write(self: LocalShardWriter, view: memoryview, offset: int) -> None:
        self._ops.pwrite(self._fd, view, offset)
        self._end = max(self._end, offset + len(view))

    patch.setattr(LocalShardWriter, "_write", write)


@mutant("a failed fsync is tried again", checks.failing_fsync)
def _(patch: Patch) -> None:
    def finish(original: Any, self: LocalShardWriter, nbytes: int) -> None:
        try:
            original(self, nbytes)
        except OSError:
            original(self, nbytes)

    around(patch, LocalShardWriter, "finish", finish)


@mutant("an error of close is swallowed", checks.failing_close)
def _(patch: Patch) -> None:
    def finish(original: Any, self: LocalShardWriter, nbytes: int) -> None:
        with contextlib.suppress(OSError):
            original(self, nbytes)

    around(patch, LocalShardWriter, "finish", finish)


@mutant("an error of a write is swallowed", checks.failing_write)
def _(patch: Patch) -> None:
    def write(original: Any, self: LocalShardWriter, view: memoryview, offset: int) -> None:
        with contextlib.suppress(OSError):
            original(self, view, offset)

    around(patch, LocalShardWriter, "_write", write)


@mutant("an error of a directory's sync is swallowed", checks.failing_directory_sync)
def _(patch: Patch) -> None:
    def sync(original: Any, self: LocalPendingDirectory) -> None:
        with contextlib.suppress(OSError):
            original(self)

    around(patch, LocalPendingDirectory, "sync_directory", sync)


@mutant("an error of a small file is swallowed", checks.failing_small_file)
def _(patch: Patch) -> None:
    def write_small(original: Any, self: LocalPendingDirectory, files: Any) -> None:
        with contextlib.suppress(OSError):
            original(self, files)

    around(patch, LocalPendingDirectory, "write_small", write_small)


@mutant("a poisoned attempt is published", checks.failing_truncate, checks.failing_fsync)
def _(patch: Patch) -> None:
    def finish(original: Any, self: ShardPipeline, progress: ShardProgress) -> None:
        try:
            original(self, progress)
        except OSError:
            progress.nbytes = progress.shard.nbytes
            self._done(progress)

    around(patch, ShardPipeline, "_finish", finish)


@mutant("the error of a background save is forgotten", checks.errors_are_reported_once_and_in_time)
def _(patch: Patch) -> None:
    patch.setattr(Committer, "take_error", lambda self: None)
