"""Planted bugs: what a harness must catch before anybody believes it. Each is one or two methods, patched."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from asyncckpt import run, starter
from asyncckpt.catalog import catalog, retention
from asyncckpt.checkpointer import Checkpointer
from asyncckpt.commit import committer
from asyncckpt.commit import transaction as commit
from asyncckpt.commit.committer import Committer
from asyncckpt.commit.pending import PendingSave, SaveReport
from asyncckpt.commit.transaction import SaveTransaction
from asyncckpt.errors import CheckpointNotFound, NoUsableCheckpoint
from asyncckpt.loop import at_exit as leaving
from asyncckpt.loop import optimizer_hooks as hooks
from asyncckpt.loop import preemption
from asyncckpt.manifest import json as manifest
from asyncckpt.manifest.records import ExtentRecord, WrittenExtent
from asyncckpt.memory.arena import Arena
from asyncckpt.read import extents as reading
from asyncckpt.read import verify
from asyncckpt.stage import eager as owned_memory
from asyncckpt.stage import job as staging
from asyncckpt.stage.eager import OwnedMemory
from asyncckpt.storage import lease, local
from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.pending_dir import LocalPendingDirectory
from asyncckpt.storage.posix import PosixOps
from asyncckpt.storage.shard_file import LocalShardWriter
from asyncckpt.testing import RecordingOps
from asyncckpt.types import ContentDigest, StagedDigests
from asyncckpt.write import shards as writing
from asyncckpt.write.progress import ShardProgress
from asyncckpt.write.reuse import ReuseSource
from asyncckpt.write.shards import ShardPipeline
from faults import beside_saves
from faults import mutant_checks as checks
from faults.mutant_checks import Check, model

Patch = pytest.MonkeyPatch
ONE, TWO, AGAIN = model("one save"), model("two saves, retention"), model("a step saved again")
LARGE, ZARR, REFLINKS = model("large shards"), model("zarr"), model("reflinks")
LINKS, PARENTS = model("links and retention"), model("parents made")
BACK, BACK_KILLED = model("a step saved again after going back"), model("killed while a step made way")
RENAMED, MADE = model("killed after the rename, then pruned"), model("killed when the run was made")


@dataclass(frozen=True)
class Mutant:
    """``apply`` plants the bug; each of ``caught_by`` has to notice."""

    name: str
    apply: Callable[[Patch], None]
    caught_by: tuple[Check, ...]


MUTANTS: list[Mutant] = []


def mutant(name: str, *caught_by: Check) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def add(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTANTS.append(Mutant(name, apply, caught_by))
        return apply

    return add


@contextlib.contextmanager
def _deaf(store: LocalStore, call: str) -> Iterator[None]:
    """Within, ``call`` does nothing."""
    real = store.ops
    silent = types.SimpleNamespace(**{name: getattr(real, name) for name in dir(real) if not name.startswith("__")})
    setattr(silent, call, lambda *_: None)
    store.ops = silent  # type: ignore[assignment]
    try:
        yield
    finally:
        store.ops = real


def _around(patch: Patch, owner: Any, name: str, mutated: Callable[..., Any]) -> None:
    """``mutated(original, self, …)`` instead of the method."""
    original = getattr(owner, name)
    patch.setattr(owner, name, functools.wraps(original)(lambda *args, **more: mutated(original, *args, **more)))


def _remove(store: LocalStore, name: str) -> None:
    """As the store does it, whoever is reading."""
    trash = os.path.join(store.path, f".trash-{name}")
    store.ops.rename_noreplace(os.path.join(store.path, name), trash)
    store.ops.fsync_directory(store.path)
    store.delete_tree(trash)


# -- durability --------------------------------------------------------------------------------------------------------


@mutant("a shard is not synced", ONE, LARGE)
def _(patch: Patch) -> None:
    def finish(original: Any, self: LocalShardWriter, nbytes: int) -> None:
        real = self._ops
        self._ops = types.SimpleNamespace(truncate=real.truncate, fsync=lambda _: None, close=real.close)  # type: ignore
        original(self, nbytes)

    _around(patch, LocalShardWriter, "finish", finish)


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

    _around(patch, LocalShardWriter, "_write", write)
    patch.setattr(LocalShardWriter, "finish", finish)


def _unsynced_file(chosen: Callable[[str], bool]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        def write_file(original: Any, self: RecordingOps, path: str, data: bytes) -> None:
            if not chosen(path):
                return original(self, path, data)
            fd = self.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            self.pwrite(fd, data, 0)
            return self.close(fd)

        _around(patch, RecordingOps, "_write_file", write_file)  # what the double does for ``write_file``

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

    _around(patch, LocalPendingDirectory, "sync_directory", sync)


@mutant("the parent is not synced after the rename", ONE, TWO)
def _(patch: Patch) -> None:
    def publish(original: Any, self: LocalPendingDirectory, name: str, *, replace: bool) -> None:
        with _deaf(self._store, "fsync_directory"):
            original(self, name, replace=replace)

    _around(patch, LocalPendingDirectory, "publish", publish)


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
        with _deaf(self, "fsync_directory"):
            found: list[str] = original(self)
        return found

    _around(patch, LocalStore, "reclaim", reclaim)


# -- order -------------------------------------------------------------------------------------------------------------


@mutant("the manifest is written before the other files", checks.order_is_the_documented_one)
def _(patch: Patch) -> None:
    late: dict[str, bytes] = {}

    class Later:
        def write_small(self, files: dict[str, bytes]) -> None:
            late.update(files)

    def write_small(original: Any, self: SaveTransaction, attempt: Any, *args: Any, **more: Any) -> Any:
        return original(self, Later(), *args, **more)

    def publish(original: Any, attempt: Any, draft: Any, *, before: Any, **more: Any) -> Any:
        def then() -> None:
            attempt.write_small(late)
            attempt.sync_directory()
            before()

        return original(attempt, draft, before=then, **more)

    _around(patch, SaveTransaction, "write_small", write_small)
    _around(patch, commit, "publish", publish)


@mutant("the rename comes before the manifest", ONE)
def _(patch: Patch) -> None:
    def publish(original: Any, attempt: Any, draft: Any, **more: Any) -> Any:
        attempt.sync_directory()
        attempt.publish(draft.name, replace=False)
        attempt.path = os.path.join(os.path.dirname(attempt.path), draft.name)
        attempt.publish = lambda *_, **__: None
        return original(attempt, draft, **more)

    _around(patch, commit, "publish", publish)


@mutant("a save is acknowledged before it is published", ONE)
def _(patch: Patch) -> None:
    def do(original: Any, self: Committer, flight: Any) -> None:
        flight.pending.resolve(SaveReport(step=1, path="", nbytes=0, written_bytes=0, stall_seconds=0,
                                          staged_seconds=0, durable_seconds=0))  # fmt: skip
        original(self, flight)

    _around(patch, Committer, "_commit", do)


@mutant("retention runs before the commit", TWO)
def _(patch: Patch) -> None:
    def publish(original: Any, self: LocalPendingDirectory, name: str, *, replace: bool) -> None:
        for old in self._store.names():
            _remove(self._store, old)
        original(self, name, replace=replace)

    _around(patch, LocalPendingDirectory, "publish", publish)


@mutant("a step that is saved again is deleted first", AGAIN)
def _(patch: Patch) -> None:
    def publish(original: Any, self: LocalPendingDirectory, name: str, *, replace: bool) -> None:
        if replace and self._store.identity(name) is not None:
            _remove(self._store, name)
        original(self, name, replace=False)

    _around(patch, LocalPendingDirectory, "publish", publish)


@mutant("a checkpoint is deleted where it is, not in the trash", TWO)
def _(patch: Patch) -> None:
    def remove(self: LocalStore, name: str) -> bool:
        self.delete_tree(os.path.join(self.path, name))
        return True

    patch.setattr(LocalStore, "remove", remove)


@mutant("files are deleted before the rename to the trash is durable", TWO)
def _(patch: Patch) -> None:
    def remove(original: Any, self: LocalStore, name: str) -> bool:
        with _deaf(self, "fsync_directory"):
            done: bool = original(self, name)
        return done

    _around(patch, LocalStore, "remove", remove)


# -- errors ------------------------------------------------------------------------------------------------------------


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

    _around(patch, LocalShardWriter, "finish", finish)


@mutant("an error of close is swallowed", checks.failing_close)
def _(patch: Patch) -> None:
    def finish(original: Any, self: LocalShardWriter, nbytes: int) -> None:
        with contextlib.suppress(OSError):
            original(self, nbytes)

    _around(patch, LocalShardWriter, "finish", finish)


@mutant("an error of a write is swallowed", checks.failing_write)
def _(patch: Patch) -> None:
    def write(original: Any, self: LocalShardWriter, view: memoryview, offset: int) -> None:
        with contextlib.suppress(OSError):
            original(self, view, offset)

    _around(patch, LocalShardWriter, "_write", write)


@mutant("an error of a directory's sync is swallowed", checks.failing_directory_sync)
def _(patch: Patch) -> None:
    def sync(original: Any, self: LocalPendingDirectory) -> None:
        with contextlib.suppress(OSError):
            original(self)

    _around(patch, LocalPendingDirectory, "sync_directory", sync)


@mutant("an error of a small file is swallowed", checks.failing_small_file)
def _(patch: Patch) -> None:
    def write_small(original: Any, self: LocalPendingDirectory, files: Any) -> None:
        with contextlib.suppress(OSError):
            original(self, files)

    _around(patch, LocalPendingDirectory, "write_small", write_small)


@mutant("a poisoned attempt is published", checks.failing_truncate, checks.failing_fsync)
def _(patch: Patch) -> None:
    def finish(original: Any, self: ShardPipeline, progress: ShardProgress) -> None:
        try:
            original(self, progress)
        except OSError:
            progress.nbytes = progress.shard.nbytes
            self._done(progress)

    _around(patch, ShardPipeline, "_finish", finish)


@mutant("the error of a background save is forgotten", checks.errors_are_reported_once_and_in_time)
def _(patch: Patch) -> None:
    patch.setattr(Committer, "take_error", lambda self: None)


# -- digests -----------------------------------------------------------------------------------------------------------


@mutant("the digest is taken after the write", checks.a_lying_device_is_found_out)
def _(patch: Patch) -> None:
    def write(
        original: Any, self: ShardPipeline, progress: ShardProgress, view: memoryview, record: WrittenExtent, n: int
    ) -> None:
        writer = self._writer(progress)
        writer.write_at(view, record.nbytes, record.offset)
        done = types.SimpleNamespace(write_at=lambda *_: None, finish=writer.finish)
        progress.writer = done  # type: ignore[assignment]
        original(self, progress, view, replace(record, digests=(self._digest(view[: record.nbytes]),)), n)
        progress.writer = writer

    _around(patch, ShardPipeline, "_write", write)


@mutant("the digest is of the wrong range", checks.saves_hold_what_was_saved)
def _(patch: Patch) -> None:
    def wrong(digest: Any, extent: Any, slot: Any) -> Any:
        found = digest(slot.view[: extent.nbytes - 1])
        return ContentDigest(found, slot.split) if extent.item_bytes else (found,) * (len(extent.cuts) + 1)

    patch.setattr(writing, "staged_digests", wrong)


@mutant("an extent's digest is not checked", checks.flipped_bits_are_found)
def _(patch: Patch) -> None:
    def hand_on(original: Any, self: Any, read: Any, extent: ExtentRecord, buffer: memoryview, got: Any) -> Any:
        place = extent.offset - read.begin
        if extent.offset == 0 or isinstance(got, OSError) or place + extent.nbytes > got:
            return original(self, read, extent, buffer, got)
        return self._consume(read.file, extent, buffer[place : place + extent.nbytes])

    _around(patch, reading._ParallelRead, "_hand_on", hand_on)


@mutant("sizes are trusted for content", checks.flipped_bits_are_found)
def _(patch: Patch) -> None:
    patch.setattr(verify, "read_extents", lambda *_, **__: [])
    patch.setattr(verify, "check_views", lambda *_: [])


@mutant("the manifest's own digest is not checked", checks.flipped_bits_are_found)
def _(patch: Patch) -> None:
    def decode(original: Any, data: bytes, where: str) -> Any:
        cut = data.rfind(b',"manifest_digest":"')
        return original(manifest.seal(data[:cut]) if cut >= 0 else data, where)

    _around(patch, manifest, "decode", decode)


@mutant("small files are not verified by a restore", checks.flipped_bits_are_found)
def _(patch: Patch) -> None:
    from asyncckpt.read import opening

    def read_record(reader: Any, manifest: Any, record: Any, limit: int) -> Any:
        return reader.read_small(record.name, limit)

    patch.setattr(opening, "read_record", read_record)


@mutant("files that the manifest does not list are tolerated", checks.foreign_files_and_stale_copies_are_refused)
def _(patch: Patch) -> None:
    def check_files(original: Any, reader: Any, manifest: Any) -> Any:
        return [damage for damage in original(reader, manifest) if "does not list" not in damage.problem]

    original = verify.check_files
    for room in (verify, catalog):
        patch.setattr(room, "check_files", functools.partial(check_files, original))


@mutant("a directory's name is not compared with its manifest", checks.foreign_files_and_stale_copies_are_refused)
def _(patch: Patch) -> None:
    def look(original: Any, self: Any, name: str, *args: Any) -> Any:
        entry = original(self, name, *args)
        return entry if entry is None else replace(entry, renamed=False, misnamed=False, damage=None)

    _around(patch, catalog.Catalog, "_inspect_once", look)


@mutant("chunks are recorded in the wrong order", checks.saves_hold_what_was_saved)
def _(patch: Patch) -> None:
    def orders(original: Any, self: ShardPipeline) -> Any:
        return {file: [*order[:-2], *order[:-3:-1]] for file, order in original(self).items()}

    _around(patch, ShardPipeline, "orders", orders)


@mutant("a shard is cut to the wrong size", checks.saves_hold_what_was_saved, LARGE)
def _(patch: Patch) -> None:
    _around(patch, LocalShardWriter, "finish", lambda original, self, nbytes: original(self, -(-nbytes // 4096) * 4096))


# -- taking over -------------------------------------------------------------------------------------------------------


@mutant("a file is taken over by its size, whatever it holds", checks.saves_hold_what_was_saved, LINKS)
def _(patch: Patch) -> None:
    def matches(original: Any, self: ShardPipeline, progress: ShardProgress, number: int, found: StagedDigests) -> Any:
        if progress.old is not None:
            found = progress.old.ordered[number].staged_digests
        return original(self, progress, number, found)

    _around(patch, ShardPipeline, "_matches", matches)


@mutant("files are taken over from a damaged checkpoint", checks.nothing_is_taken_over_from_a_damaged_checkpoint)
def _(patch: Patch) -> None:
    def opened(original: Any, self: ReuseSource, kind: str) -> Any:
        known, self._quarantined = self._quarantined, ()
        try:
            return original(self, kind)
        finally:
            self._quarantined = known

    _around(patch, ReuseSource, "open", opened)


# -- retention, recovery, other processes ------------------------------------------------------------------------------


@mutant("retention takes the newest", TWO, checks.retention_keeps_what_it_must)
def _(patch: Patch) -> None:
    patch.setattr(committer, "plan", lambda entries, policies: [e for e in entries if not e.pinned][-1:])


@mutant("retention takes pinned checkpoints", checks.retention_keeps_what_it_must)
def _(patch: Patch) -> None:
    def plan(entries: Any, policies: Any) -> Any:
        bare = [replace(entry, pinned=False) for entry in entries]
        return retention.plan(bare, policies)

    patch.setattr(committer, "plan", plan)


@mutant("retention takes a checkpoint that is being read", checks.retention_keeps_what_it_must)
def _(patch: Patch) -> None:
    patch.setattr(local, "_try_exclusive", lambda path: -1)


@mutant("a run falls back to the start without a word", checks.a_run_without_a_usable_checkpoint_does_not_start_anew)
def _(patch: Patch) -> None:
    def newest(original: Any, self: run.Run, *args: Any) -> Any:
        try:
            return original(self, *args)
        except NoUsableCheckpoint as error:
            raise CheckpointNotFound(str(error)) from None

    _around(patch, run.Run, "_restore_newest", newest)


@mutant("a damaged newest checkpoint is passed over in silence", checks.a_damaged_newest_is_passed_over_loudly)
def _(patch: Patch) -> None:
    patch.setattr(run, "warnings", types.SimpleNamespace(warn=lambda *_, **__: None))


@mutant("an attempt's directory is used again", checks.nothing_is_ever_overwritten)
def _(patch: Patch) -> None:
    _around(patch, PosixOps, "mkdir", lambda original, self, path: os.makedirs(path, exist_ok=True))


@mutant("the rename replaces what is there", checks.nothing_is_ever_overwritten)
def _(patch: Patch) -> None:
    patch.setattr(PosixOps, "rename_noreplace", lambda self, source, target: os.rename(source, target))


@mutant("attempts of a live run are reclaimed", checks.a_live_run_keeps_its_attempts)
def _(patch: Patch) -> None:
    unlocked = types.SimpleNamespace(LOCK_EX=0, LOCK_NB=0, flock=lambda *_: None)
    patch.setattr(lease, "fcntl", unlocked)


@mutant("the lease is not checked before the publish", checks.a_run_that_was_cut_off_publishes_nothing)
def _(patch: Patch) -> None:
    patch.setattr(lease.HeldLease, "check", lambda self: None)


# -- going back --------------------------------------------------------------------------------------------------------


@mutant("a step that is saved again after going back is deleted first", BACK)
def _(patch: Patch) -> None:
    def make_way(self: LocalStore, name: str, attempt: str) -> None:
        _remove(self, name)

    patch.setattr(LocalStore, "make_way", make_way)


@mutant("what had made way when a run was killed is deleted unseen", BACK, BACK_KILLED)
def _(patch: Patch) -> None:
    def settle(self: catalog.Catalog) -> None:
        for one in self._store.replaced():
            self._store.remove(one.hidden)

    patch.setattr(catalog.Catalog, "settle_replaced", settle)


@mutant("what had made way gets its name back though its successor is there", BACK)
def _(patch: Patch) -> None:
    def settle(self: catalog.Catalog) -> None:
        for one in self._store.replaced():
            if self._store.identity(one.name) is not None:
                _remove(self._store, one.name)  # type: ignore[arg-type]
            self._store.put_back(one)

    patch.setattr(catalog.Catalog, "settle_replaced", settle)


@mutant("a save that failed does not give its step back to what made way", checks.a_failed_save_replaces_nothing)
def _(patch: Patch) -> None:
    patch.setattr(LocalStore, "put_back", lambda self, replaced: True)


@mutant("the largest step is taken for the newest", checks.what_was_saved_last_is_the_newest, BACK)
def _(patch: Patch) -> None:
    patch.setattr(catalog, "age", lambda entry: (0, entry.step))


@mutant("retention keeps the largest steps", checks.what_was_saved_last_is_the_newest)
def _(patch: Patch) -> None:
    patch.setattr(retention, "age", lambda candidate: (0, candidate.step))


@mutant("retention takes copies that somebody made", checks.what_others_made_stays)
def _(patch: Patch) -> None:
    def own(self: Committer) -> Any:
        return [entry for entry in self._catalog.entries(fresh=False) if entry.damage is None]

    patch.setattr(Committer, "_own", own)


@mutant("whatever begins with .tmp- is deleted", checks.what_others_made_stays)
def _(patch: Patch) -> None:
    patch.setattr(local, "_LEFTOVER", re.compile(r"\.(tmp|trash)-.*"))


# -- what is copied when -----------------------------------------------------------------------------------------------


@mutant(
    "memory is given back without the copies still queued into it",
    checks.copies_of_a_failed_save_land_on_nothing,
    checks.nor_on_what_the_host_writes,
)
def _(patch: Patch) -> None:
    _around(patch, Arena, "release", lambda original, self, slot: original(self, replace(slot, copies=())))


@mutant("the host writes into memory that copies are queued into", checks.nor_on_what_the_host_writes)
def _(patch: Patch) -> None:
    patch.setattr(staging, "host_writes", lambda *_: False)


@mutant("an error of the thread that copies is not told to the save", checks.a_save_that_cannot_be_copied_ends_at_once)
def _(patch: Patch) -> None:
    patch.setattr(staging.StagingJob, "cancel", lambda *_: None)


@mutant("only the watched optimizer waits for what is deferred", checks.an_optimizer_made_anew_waits)
def _(patch: Patch) -> None:
    patch.setattr(hooks.WatchedOptimizers, "_concerns", lambda self, optimizer, flight: optimizer in self)


@mutant("what an optimizer has is deferred, frozen or not", checks.frozen_parameters_are_not_deferred)
def _(patch: Patch) -> None:
    def owned(self: hooks.WatchedOptimizers) -> Any:
        memory = OwnedMemory()
        for optimizer in self._alive():
            memory.add(p for group in optimizer.param_groups for p in group["params"])
        return memory

    def divided(pieces: Any, owned: OwnedMemory) -> Any:
        return owned_memory.divide([replace(one, spec=replace(one.spec, frozen=False)) for one in pieces], owned)

    patch.setattr(hooks.WatchedOptimizers, "owned", owned)
    patch.setattr(starter, "divide", divided)


@mutant("a whole memory block counts as owned", checks.buffers_beside_parameters_are_not_deferred)
def _(patch: Patch) -> None:
    patch.setattr(owned_memory, "_span", owned_memory._block)
    patch.setattr(OwnedMemory, "_is_apart", lambda *_: False)

    def add(self: OwnedMemory, tensors: Any) -> None:
        self._others += [owned_memory._block(tensor) for tensor in tensors]

    patch.setattr(OwnedMemory, "add", add)


# -- beside the saves: who learns how they ended, forked children, what is taken for unchanged -------------------------


def _everywhere_at_home(patch: Patch, module: Any) -> None:
    """For this module, a forked child is the process that it was forked from."""
    found = {name: getattr(os, name) for name in dir(os)} | {"getpid": lambda: 1}
    patch.setattr(module, "os", types.SimpleNamespace(**found))


@mutant("whoever begins to await has seen the error", beside_saves.who_awaited_in_vain_is_told)
def _(patch: Patch) -> None:
    def awaited(self: PendingSave) -> Any:
        self._observed = True
        return asyncio.wrap_future(self._future).__await__()

    patch.setattr(PendingSave, "__await__", awaited)


@mutant("whoever begins to wait has seen the error", beside_saves.who_waited_in_vain_is_told)
def _(patch: Patch) -> None:
    def deliver(original: Any, self: PendingSave, timeout: float | None) -> None:
        self._observed = True
        original(self, timeout)

    _around(patch, PendingSave, "_deliver", deliver)


@mutant("the drain runs in a forked child", beside_saves.a_forked_child_ends_at_once)
def _(patch: Patch) -> None:
    def close(original: Any, self: Checkpointer) -> None:
        self._pid = os.getpid()
        original(self)

    _everywhere_at_home(patch, leaving)
    _around(patch, Checkpointer, "close", close)


@mutant("a forked child waits for a save of its parent's", beside_saves.a_forked_child_does_not_wait_for_a_save)
def _(patch: Patch) -> None:
    patch.setattr(PendingSave, "disarm", lambda self: None)


@mutant("a forked child takes a note of signals, like its parent", beside_saves.a_forked_child_ends_on_sigterm)
def _(patch: Patch) -> None:
    _everywhere_at_home(patch, preemption)
    patch.setattr(preemption.SignalWatch, "disarm", lambda self: None)


@mutant("a forked child keeps the directory's lock", beside_saves.a_forked_child_has_no_lock)
def _(patch: Patch) -> None:
    patch.setattr(lease._LockFile, "disarm", lambda self: None)


@mutant("crc32c alone decides a link", beside_saves.a_change_that_crc32c_does_not_show_is_saved)
def _(patch: Patch) -> None:
    patch.setattr(commit, "second_digest", lambda name: None)
