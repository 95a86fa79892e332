"""Decides what one save takes over from the checkpoint before, instead of writing it.

A shard whose extents all have the previous checkpoint's content is linked. As long as a shard's extents match, none of
them is written; once one differs, those that matched are copied over from the previous checkpoint, verified. Some of
the extents that match are read back while their bytes are still staged, in turn over the saves (``link_checks``): where
the stored ones are damaged, the shard is written anew. Where files are saved as differences, a chunk is stored as its
difference to the same chunk of the checkpoint before.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from asyncckpt.codecs.blosc import Array
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.records import FileRecord, WrittenExtent
from asyncckpt.memory.arena import Arena, StagingBuffer
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.protocols import Codec, Digest, PendingDirectory
from asyncckpt.read.delta import DeltaReader, layer_name
from asyncckpt.scope import SaveScope
from asyncckpt.stage.image import cut_digests, finish_image, slot_bytes, staged_digests
from asyncckpt.types import ALIGNMENT_BYTES, FRAME_HEADER_BYTES, Extent, StagedDigests
from asyncckpt.write.link_checks import ReadBack
from asyncckpt.write.progress import ShardProgress
from asyncckpt.write.reuse import Previous, ReusableFile, ReuseSource

log = logging.getLogger("asyncckpt")


class OpensDirectory(Protocol):
    """Opens the directory that the save is written to; whichever thread comes first makes it."""

    def open(self) -> PendingDirectory: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """Says what becomes of an extent. ``held``: nothing of it has to be written for now. ``copies``: the extents that
    matched before it and have to be copied now. ``linked``: the whole file has been taken over."""

    held: bool
    copies: Sequence[int] = ()
    linked: bool = False


class Unchanged:
    """Compares the extents of one save with the checkpoint before. Thread-safe.

    ``source``: gives that checkpoint to the first ``begin``; None: everything is written. ``second``: a digest that has
    to agree too before anything is taken over, where ``digest`` alone is too short to decide that. ``chain``: how often
    in a row a file may be saved as differences. ``arena``: holds what is staged; while somebody waits for memory,
    almost nothing is read back."""

    def __init__(
        self,
        shards: Sequence[ShardProgress],
        *,
        scope: SaveScope,
        source: ReuseSource | None,
        kind: str,
        codec: Codec,
        digest: Digest,
        second: Digest | None,
        chain: int,
        arena: Arena,
    ) -> None:
        self._shards = shards
        self._scope = scope
        self._source = source
        self._kind = kind
        self._codec = codec
        self._digest = digest
        self._second = second
        self._chain = chain
        self._lock = threading.Lock()
        self._begun = False
        self._read_back = ReadBack(arena, kind)
        self._previous: Previous | None = None
        self._recorded: dict[str, FileRecord] | None = None
        self._layer_reader: DeltaReader | None = None
        #: Files that were linked as layers to build on, and then were not needed.
        self.unused: list[FileRecord] = []

        #: The name of the checkpoint before, where it was found damaged.
        self.damaged = ""

    @property
    def differs(self) -> bool:
        """Whether chunks may be stored as differences."""
        return self._chain > 0

    def begin(self) -> None:
        """Open the checkpoint before. Blocks on the disk the first time, and does nothing after it."""
        with self._lock:
            if self._begun:
                return
            self._begun = True
            if self._scope.error is not None or self._source is None:
                return
            previous = self._source.open(self._kind)
            if previous is None:
                return
            self._previous = previous
            self._layer_reader = DeltaReader(previous.reader, self._codec, self._digest)
            for progress in self._shards:
                old = previous.find(progress.shard) if self._may_match(progress) else None
                if old is not None and self._second is not None and len(old.seconds) != len(progress.shard.extents):
                    old = None  # another process wrote it
                progress.old = old
                progress.matching = progress.old is not None
            own = (extent.nbytes for one in self._shards if not _settled(one) for extent in one.shard.extents)
            self._read_back.begin(self._source.link_checks, sum(own))

    def _may_match(self, progress: ShardProgress) -> bool:
        """Return whether the shard is worth comparing. Of those that several ranks write these are the frozen ones: of
        the others, some rank's part has nearly always changed, and the ranks whose part has not would learn it late."""
        shard = progress.shard
        if shard.multi_writer:
            return self.links_shared and progress.frozen and bool(shard.extents)
        return bool(shard.extents)

    def expected_bytes(self) -> int:
        """Estimate the bytes that the disk must have room for; frozen tensors that the previous checkpoint holds are
        assumed equal. Blocks as ``begin`` does."""
        self.begin()
        return sum(progress.shard.nbytes for progress in self._shards if not _settled(progress))

    def note(self, progress: ShardProgress, number: int, extent: Extent, slot: StagingBuffer) -> None:
        """Take the second digest of a staged extent, if one is wanted."""
        if self._second is not None:
            progress.seconds[number] = staged_digests(self._second, extent, slot)

    def compare(
        self,
        progress: ShardProgress,
        number: int,
        found: StagedDigests,
        lock: threading.Lock,
        directory: OpensDirectory,
    ) -> Verdict:
        """Say what becomes of extent ``number``, whose digests are ``found``, and whose bytes are staged. ``lock``
        guards the shards' progress. Blocks on the disk where the whole file can be linked, and where it is the extent's
        turn to be read back."""
        old = progress.old
        if old is None:
            return Verdict(held=False)
        equal = progress.equal(old, number, found) and self._is_stored(progress, old, number)
        with lock:
            if not progress.matching:
                return Verdict(held=False)
            if equal:
                progress.matched.append(number)
                if len(progress.matched) < len(progress.shard.extents):
                    return Verdict(held=True)
                complete, copies = True, [n for n in progress.matched if n != number]
            else:
                progress.matching = complete = False
                copies, progress.matched = progress.matched, []
        if complete and progress.shard.multi_writer:
            self._take_records(progress, old, lock)
            progress.held_back = True
            return Verdict(held=True, linked=True)
        if complete and self._link(progress, old, lock, directory):
            return Verdict(held=True, linked=True)
        progress.matching = False
        return Verdict(held=False, copies=copies)

    def _is_stored(self, progress: ShardProgress, old: ReusableFile, number: int) -> bool:
        """Return whether the file of the checkpoint before still has the bytes of an extent; True where it is not its
        turn to be read back. Blocks."""
        if not progress.matching:
            return True  # it is written
        nbytes = sum(base.chunk(number).nbytes for base in old.bases) + old.ordered[number].nbytes
        read = self.image_of if old.bases else self.bytes_of
        error = self._read_back.check(progress.shard.file, number, nbytes, lambda: read(progress, number))
        if error is not None:
            self._distrust(error)
            with progress.lock:
                if progress.layers is None:
                    progress.layers = ()  # nor is it built on
        return error is None

    def _has_format_extents(self, old: ReusableFile) -> bool:
        """Return whether what the format itself put into a file, such as its header, is still as it was written; True
        where it is not its turn to be read back. Blocks."""
        ours = {extent.offset for extent in old.ordered}
        for at, extent in enumerate(old.record.extents if old.record.content_key else ()):
            if extent.offset in ours:
                continue
            read = functools.partial(self._read, old, extent.offset, extent.nbytes, (extent.digest,), ())
            error = self._read_back.check(old.record.name, -1 - at, extent.nbytes, read, wait=True)
            if error is not None:
                self._distrust(error)
                return False
        return True

    def _distrust(self, error: Exception) -> None:
        """Tell that the checkpoint before is damaged; nothing is taken over from it any more after this save."""
        if self._previous is not None and self._source is not None:
            self._source.distrust(self._previous.reader.name)
            self.damaged = self._previous.reader.name
            log.error(
                "step %d: a file of the checkpoint before is damaged since it was written (%s); this save writes it "
                "anew, and retention does not count that checkpoint. Look with `asyncckpt verify --all`: older ones "
                "may share the file",
                self._scope.step,
                error,
            )

    def _link(
        self, progress: ShardProgress, old: ReusableFile, lock: threading.Lock, directory: OpensDirectory
    ) -> bool:
        """Link the whole file and those it builds on; return False where the file system cannot (its extents are then
        copied)."""
        previous = self._previous
        if previous is None or not self._has_format_extents(old):
            return False
        linked: list[FileRecord] = []
        for layer in old.layers:
            if not directory.open().link(previous.reader, layer.name, layer.nbytes, layer.name):
                with progress.lock:
                    progress.layers = ()  # no differences, then
                self.unused += linked  # what is linked already stays, listed like everything else
                return False
            linked.append(layer)
        self._take_records(progress, old, lock)
        progress.linked = True
        return True

    def _take_records(self, progress: ShardProgress, old: ReusableFile, lock: threading.Lock) -> None:
        with lock:
            progress.records = dict(enumerate(old.ordered))
            if not progress.shard.multi_writer:
                known = {record.offset for record in progress.parts()}
                progress.format_extents = [extent for extent in old.record.extents if extent.offset not in known]
            progress.layers = old.bases
            progress.nbytes = old.record.nbytes
            progress.missing = 0

    # -- files that several ranks write --------------------------------------------------------------------------------

    @property
    def links_shared(self) -> bool:
        """Whether such files can be linked, as far as is known."""
        return self._source is not None and self._source.links_shared

    def hear(self, *, links: bool = True, damaged: str = "") -> None:
        """Note what another rank says: whether such files can be linked, and which checkpoint it has found damaged."""
        if self._source is not None and not links:
            self._source.others_link = False
        if self._source is not None and damaged:
            self._source.distrust(damaged)

    @property
    def compared_with(self) -> str:
        """The name of the checkpoint before, where a second digest of it was compared too, which no manifest has. Empty
        elsewhere: what the manifest says is enough then, whichever checkpoint's it is."""
        return self._previous.reader.name if self._previous is not None and self._second is not None else ""

    def link_shared(self, record: FileRecord, directory: PendingDirectory) -> bool:
        """Link a file of which several ranks say that it is as ``record`` has it. Return False where the manifest of
        the checkpoint before does not say the same, or the file system cannot. Blocks on the disk."""
        previous = self._previous
        if previous is None:
            return False
        try:
            if self._recorded is None:
                self._recorded = {known.name: known for known in manifests.load(previous.reader).files}
            if self._recorded.get(record.name) != record:
                return False
            return directory.link(previous.reader, record.name, record.nbytes, record.name)
        except CheckpointDamaged as error:
            self._distrust(error)
            return False

    def bytes_of(self, progress: ShardProgress, number: int) -> tuple[memoryview, WrittenExtent]:
        """Read an extent's bytes out of the previous checkpoint; return them with their record there. Blocks. Raises
        ``CheckpointDamaged`` where they are not what was written."""
        known, _ = self._known(progress)
        old = known.ordered[number]
        cuts = progress.shard.extents[number].digest_boundaries
        return self._read(known, old.offset, old.nbytes, old.digests, cuts), old

    def _read(
        self, known: ReusableFile, offset: int, nbytes: int, digests: tuple[str, ...], cuts: Sequence[int]
    ) -> memoryview:
        """Read a part of a file of the previous checkpoint and verify it; see ``bytes_of``."""
        assert self._previous is not None
        reader, name = self._previous.reader, known.record.name
        lead = offset % ALIGNMENT_BYTES  # whole blocks are read: past the page cache, too, where a rank's part begins
        buffer = memoryview(aligned_buffer(lead + nbytes))
        got = reader.read_into(name, buffer, lead + nbytes, offset - lead)
        if got != lead + nbytes or cut_digests(self._digest, buffer[lead:got], cuts) != digests:
            where = f"{reader.path}/{name} [{offset}:{offset + nbytes}]"
            raise CheckpointDamaged(f"{where}: the bytes do not match their digest")
        return buffer[lead:]

    def image_of(self, progress: ShardProgress, number: int) -> StagingBuffer:
        """Read a chunk out of the previous checkpoint, decode it through the files that it builds on, and return it as
        if it had been staged. Blocks. Raises ``CheckpointDamaged``."""
        known, _ = self._known(progress)
        extent = progress.shard.extents[number]
        buffer = memoryview(aligned_buffer(slot_bytes(extent)))
        slot = StagingBuffer(-1, 0, len(buffer), 0, buffer)
        if self._layer_reader is not None:
            data: Array = np.frombuffer(buffer, np.uint8)[FRAME_HEADER_BYTES : extent.nbytes]
            self._layer_reader.add(known.layers, number, data)
        finish_image(extent, slot)
        return slot

    def _known(self, progress: ShardProgress) -> tuple[ReusableFile, Previous]:
        assert progress.old is not None
        assert self._previous is not None
        return progress.old, self._previous

    def layers_of(self, progress: ShardProgress, directory: OpensDirectory) -> tuple[FileRecord, ...]:
        """Link the files that this shard's chunks are saved as differences to, the first time, and return them; empty
        where chunks are stored whole."""
        if not self._chain:
            return ()
        with progress.lock:
            if progress.layers is not None:
                return progress.layers
            progress.layers = ()
            old, previous = progress.old, self._previous
            if old is None or previous is None or len(old.layers) > self._chain:
                return ()
            layers = [replace(layer, name=layer_name(layer, previous.reader), bases=()) for layer in old.layers]
            linked = [
                directory.open().link(previous.reader, layer.name, layer.nbytes, new.name)
                for layer, new in zip(old.layers, layers, strict=True)
            ]
            if all(linked):
                progress.layers = tuple(layers)
            else:  # no differences, then; what is linked already stays, listed like everything else
                self.unused += [layer for layer, there in zip(layers, linked, strict=True) if there]
            return progress.layers

    def subtract(self, progress: ShardProgress, number: int, extent: Extent, slot: StagingBuffer) -> None:
        """Turn a staged chunk, in place, into its difference (XOR) to the previous checkpoint's. Blocks."""
        if self._layer_reader is not None and progress.old is not None:
            data: Array = np.frombuffer(slot.view, np.uint8)[FRAME_HEADER_BYTES : extent.nbytes]
            self._layer_reader.add(progress.old.layers, number, data)

    def close(self) -> None:
        """Close the previous checkpoint. Call it once the save has ended, whichever way. Idempotent."""
        self._read_back.end()
        previous, self._previous = self._previous, None
        if previous is not None:
            previous.reader.close()


def _settled(progress: ShardProgress) -> bool:
    """Return whether a shard is expected not to be written: training does not change it, and it is there already."""
    return progress.old is not None and progress.frozen
