"""Planted bugs: what is written, verified or taken over is not what was saved."""

from __future__ import annotations

import functools
import types
from dataclasses import replace
from typing import Any

from asyncckpt.catalog import catalog
from asyncckpt.catalog.steps import StepRegistry
from asyncckpt.checkpointer import Checkpointer
from asyncckpt.manifest import json as manifest
from asyncckpt.manifest.records import ExtentRecord
from asyncckpt.read import extents as reading
from asyncckpt.read import verify
from asyncckpt.storage.shard_file import LocalShardWriter
from asyncckpt.types import ContentDigest, StagedDigests
from asyncckpt.write import shards as writing
from asyncckpt.write.link_checks import LinkRound
from asyncckpt.write.progress import ShardProgress
from asyncckpt.write.reuse import ReuseSource
from asyncckpt.write.shards import ShardPipeline
from asyncckpt.write.unchanged import Unchanged
from asyncckpt.write.written import WrittenFiles
from faults import mutant_checks as checks
from faults.mutant_checks import LARGE, LINKS
from faults.mutants.registry import Patch, around, mutant

# -- digests -----------------------------------------------------------------------------------------------------------


@mutant("the digest is taken after the write", checks.a_lying_device_is_found_out)
def _(patch: Patch) -> None:
    def write(
        original: Any, self: ShardPipeline, progress: ShardProgress, view: memoryview, records: Any, n: int
    ) -> None:
        writer = self._writer(progress)
        nbytes = sum(record.nbytes for record in records)
        writer.write_at(view, nbytes, records[0].offset)
        done = types.SimpleNamespace(write_at=lambda *_: None, finish=writer.finish)
        progress.writer = done  # type: ignore[assignment]
        late, begin = [], 0
        for record in records:
            late.append(replace(record, digests=(self._digest(view[begin : begin + record.nbytes]),)))
            begin += record.nbytes
        original(self, progress, view, late, n)
        progress.writer = writer

    around(patch, ShardPipeline, "_write", write)


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

    around(patch, reading._ParallelRead, "_hand_on", hand_on)


@mutant("sizes are trusted for content", checks.flipped_bits_are_found)
def _(patch: Patch) -> None:
    patch.setattr(verify, "read_extents", lambda *_, **__: [])
    patch.setattr(verify, "check_views", lambda *_: [])


@mutant("the manifest's own digest is not checked", checks.flipped_bits_are_found)
def _(patch: Patch) -> None:
    def decode(original: Any, data: bytes, where: str) -> Any:
        cut = data.rfind(b',"manifest_digest":"')
        return original(manifest.seal(data[:cut]) if cut >= 0 else data, where)

    around(patch, manifest, "decode", decode)


@mutant("small files are not verified by a restore", checks.flipped_bits_are_found)
def _(patch: Patch) -> None:
    from asyncckpt.read import opening

    def read_record(reader: Any, manifest: Any, record: Any, limit: int) -> Any:
        return reader.read_small(record.name, limit)

    patch.setattr(opening, "read_record", read_record)


@mutant("files that the manifest does not list are not reported", checks.foreign_files_and_stale_copies_are_refused)
def _(patch: Patch) -> None:
    def check_files(original: Any, reader: Any, manifest: Any) -> Any:
        return original(reader, manifest)._replace(extra=())

    original = verify.check_files
    for room in (verify, catalog):
        patch.setattr(room, "check_files", functools.partial(check_files, original))


@mutant("linked files are never read back", checks.damage_to_a_linked_file_does_not_live_on)
def _(patch: Patch) -> None:
    patch.setattr(LinkRound, "take", lambda *_: False)


@mutant("what was read back and is damaged is linked all the same", checks.damage_to_a_linked_file_does_not_live_on)
def _(patch: Patch) -> None:
    around(patch, Unchanged, "_is_stored", lambda original, *args: original(*args) or True)


@mutant("a save names no parent", checks.what_training_left_is_marked)
def _(patch: Patch) -> None:
    patch.setattr(StepRegistry, "parent_of", lambda *_: "")


@mutant("a part that is restored moves the line", checks.what_training_left_is_marked)
def _(patch: Patch) -> None:
    def restored(original: Any, self: Any, report: Any) -> None:
        original(self, replace(report, whole=True))

    around(patch, Checkpointer, "_after_restore", restored)


@mutant("a directory's name is not compared with its manifest", checks.foreign_files_and_stale_copies_are_refused)
def _(patch: Patch) -> None:
    def look(original: Any, self: Any, name: str, *args: Any) -> Any:
        entry = original(self, name, *args)
        return entry if entry is None else replace(entry, renamed=False, misnamed=False, damage=None)

    around(patch, catalog.Catalog, "_inspect_once", look)


@mutant("chunks are recorded in the wrong order", checks.saves_hold_what_was_saved)
def _(patch: Patch) -> None:
    def orders(original: Any, self: WrittenFiles) -> Any:
        return {file: [*order[:-2], *order[:-3:-1]] for file, order in original(self).items()}

    around(patch, WrittenFiles, "orders", orders)


@mutant("a shard is cut to the wrong size", checks.saves_hold_what_was_saved, LARGE)
def _(patch: Patch) -> None:
    around(patch, LocalShardWriter, "finish", lambda original, self, nbytes: original(self, -(-nbytes // 4096) * 4096))


# -- taking over -------------------------------------------------------------------------------------------------------


@mutant("a file is taken over by its size, whatever it holds", checks.saves_hold_what_was_saved, LINKS)
def _(patch: Patch) -> None:
    def matches(
        original: Any, self: ShardPipeline, progress: ShardProgress, number: int, found: StagedDigests, here: Any
    ) -> Any:
        if progress.old is not None:
            found = progress.old.ordered[number].staged_digests
        return original(self, progress, number, found, here)

    around(patch, ShardPipeline, "_matches", matches)


@mutant(
    "files are taken over, unread, from a damaged checkpoint", checks.nothing_is_taken_over_from_a_damaged_checkpoint
)
def _(patch: Patch) -> None:
    def opened(original: Any, self: ReuseSource, kind: str) -> Any:
        known, self._quarantined = self._quarantined, ()
        try:
            return original(self, kind)
        finally:
            self._quarantined = known

    around(patch, ReuseSource, "open", opened)
    patch.setattr(LinkRound, "take", lambda *_: False)
