"""The next save can take files over from the previous checkpoint: equal ones are not written again."""

from __future__ import annotations

import bisect
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from asyncckpt import forks
from asyncckpt.errors import AsyncCkptError, CheckpointNotFound
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.records import (
    ChunkedRecord,
    ExtentRecord,
    FileRecord,
    Manifest,
    WrittenExtent,
    join_records,
    written_extent,
)
from asyncckpt.manifest.table import TensorTable
from asyncckpt.protocols import Capability, Reader, Store
from asyncckpt.types import ShardFile, StagedDigests
from asyncckpt.write.link_checks import LinkChecks

log = logging.getLogger("asyncckpt")

#: How many of the newest checkpoints may be tried: older ones are not worth it.
_REMEMBERED = 4


@dataclass(frozen=True, slots=True)
class ReusableFile:
    """A file of the previous checkpoint. ``ordered``: its extents in the order of the layout that it was made by,
    without those that the format adds; until ``matching_layout``, one for each part between two digest boundaries.
    ``bases``: the files that it builds on. ``seconds``: the extents' second digests (``digests.second``), which only
    the process that wrote the file knows."""

    record: FileRecord
    ordered: tuple[WrittenExtent, ...]
    bases: tuple[FileRecord, ...] = ()
    seconds: tuple[StagedDigests, ...] = ()

    @property
    def layers(self) -> tuple[FileRecord, ...]:
        """The files whose chunks, XORed, give its data; the file itself is the last."""
        return (*self.bases, self.record)

    def matching_layout(self, shard: ShardFile) -> ReusableFile | None:
        """Return this file with its extents as the shard has them, which are this rank's where several write the file;
        None where the two differ in more than contents."""
        if self.record.content_key != shard.content_key:
            return None
        if shard.packed_on_write:
            equal = len(self.ordered) == len(shard.extents) and all(extent.content for extent in self.ordered)
            return self if equal else None
        # placed by a format that may add to it (zarr), the record has more extents than the layout
        joined = join_records(self._parts_of(shard) if shard.multi_writer else self.ordered, shard.extents)
        return None if joined is None else replace(self, ordered=joined)

    def _parts_of(self, shard: ShardFile) -> list[WrittenExtent]:
        """List the parts that begin in one of the shard's extents; none where the file has another size."""
        if self.record.nbytes != shard.nbytes:
            return []
        begins = [extent.offset for extent in shard.extents]
        found: list[WrittenExtent] = []
        for part in self.ordered:
            at = bisect.bisect_right(begins, part.offset) - 1
            if at >= 0 and part.offset < begins[at] + shard.extents[at].nbytes:
                found.append(part)
        return found


@dataclass(frozen=True, slots=True)
class Previous:
    """An open, published checkpoint. Retention spares it until the reader is closed."""

    reader: Reader
    files: Mapping[str, ReusableFile]

    def find(self, shard: ShardFile) -> ReusableFile | None:
        """Return the file that could be equal to this shard, or None."""
        known = self.files.get(shard.file)
        return known.matching_layout(shard) if known is not None else None


class _SpreadFiles(Mapping[str, ReusableFile]):
    """Maps the names of files that parts of a manifest describe, and of those that it lists itself. A part is read when
    somebody asks for a file of it."""

    def __init__(self, files: Sequence[FileRecord]) -> None:
        self._files = {record.name: record for record in files}

    def __getitem__(self, name: str) -> ReusableFile:
        record = self._files[name]
        return ReusableFile(record, tuple(map(written_extent, record.extents)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def files_of(manifest: Manifest) -> Mapping[str, ReusableFile]:
    """List the files of a checkpoint that another process wrote, by name. Those of a manifest in parts can be looked up
    for as long as the checkpoint is open."""
    if manifest.parts is not None:
        return _SpreadFiles(manifest.files)
    ordered: dict[str, list[ExtentRecord]] = {}
    files = {record.name: record for record in manifest.files}
    for component in manifest.components.values():
        if isinstance(component.tensors, TensorTable):  # none of them is cut into chunks
            continue
        for tensor in component.tensors.values():
            for part in tensor.parts if isinstance(tensor, ChunkedRecord) else ():
                extents = files[part.file].extents
                ordered.setdefault(part.file, []).extend(extents[i] for i in part.extents)
    return {
        # where places are fixed, what the format adds is an extent of the layout too
        name: ReusableFile(
            record,
            tuple(map(written_extent, ordered[name] if record.content_key and name in ordered else record.extents)),
            tuple(files[base] for base in record.bases),
        )
        for name, record in files.items()
    }


class DamagedNames(Protocol):
    """Holds the names of the checkpoints of a run that were found damaged. Thread-safe."""

    def __contains__(self, name: object, /) -> bool: ...

    def add(self, name: str) -> None: ...


class ReuseSource:
    """Remembers the newest checkpoints of each kind, from which the next save may take files over. Thread-safe.

    ``quarantined``: the checkpoints that were found damaged. ``link_checks``: what of the files that are taken over is
    read back.
    """

    def __init__(self, store: Store, quarantined: DamagedNames) -> None:
        self.link_checks = LinkChecks()
        #: Whether rank 0 can link files here, as far as is known.
        self.others_link = True
        self._store = store
        self._quarantined = quarantined
        self._lock = threading.Lock()
        #: By kind: names, the newest last, each with the files where this process has written them.
        self._known: dict[str, list[tuple[str, Mapping[str, ReusableFile] | None]]] = {}

    @property
    def links_shared(self) -> bool:
        """Whether files that several ranks write can be linked, as far as is known."""
        return self.others_link and Capability.LINKS in self._store.capabilities

    def learn(self, kind: str, name: str, files: Mapping[str, ReusableFile] | None = None) -> None:
        """Remember a checkpoint as the newest of its kind. ``files``: its files, where they are known already."""
        with self._lock:
            others = [one for one in self._known.get(kind, ()) if one[0] != name]
            self._known[kind] = [*others, (name, files)][-_REMEMBERED:]

    def names(self) -> dict[str, list[str]]:
        """Return the names of the checkpoints that are remembered, by kind, the newest last."""
        with self._lock:
            return {kind: [name for name, _ in known] for kind, known in self._known.items()}

    def distrust(self, name: str) -> None:
        """Note that a file of this checkpoint was found damaged: nothing is taken over from it any more."""
        self._quarantined.add(name)

    def forget(self, kind: str) -> None:
        """Forget all checkpoints of that kind: the next save writes everything."""
        with self._lock:
            self._known.pop(kind, None)

    def open(self, kind: str) -> Previous | None:
        """Open the newest checkpoint of that kind that is still there and was not found damaged. Blocks on the disk.
        Where none can be read it returns None, and everything is written."""
        with self._lock:
            known = list(self._known.get(kind, ()))
        for name, files in reversed(known):
            if name in self._quarantined:
                continue
            try:
                return self._opened(name, files)
            except CheckpointNotFound:  # deleted by retention
                continue
            except (AsyncCkptError, OSError) as error:
                log.warning("nothing is taken over from the checkpoint before: %s", error)
                return None
        return None

    def _opened(self, name: str, files: Mapping[str, ReusableFile] | None) -> Previous:
        reader = self._store.open(name)
        try:
            forks.disarm_in_child(reader)  # a forked child does not have it open
            return Previous(reader, files if files is not None else files_of(manifests.load(reader)))
        except BaseException:
            reader.close()
            raise
