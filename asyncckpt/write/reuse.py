"""The previous checkpoint, as far as the next save can take its files over: what is equal is not written again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from asyncckpt.manifest.records import ChunkedRecord, ExtentRecord, FileRecord, Manifest, join_records
from asyncckpt.protocols import Reader
from asyncckpt.types import Shard


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A file of the previous checkpoint; ``ordered`` are its extents in the order of the layout that it was made by
    (what a format adds around them is only in the record), each part of one a record of its own until ``fitted``.
    ``seconds``: their second digests (``digests.second``), which only the process that wrote the file knows."""

    record: FileRecord
    ordered: tuple[ExtentRecord, ...]
    bases: tuple[FileRecord, ...] = ()
    seconds: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[FileRecord, ...]:
        """The files that together give its data."""
        return (*self.bases, self.record)

    def fitted(self, shard: Shard) -> KnownFile | None:
        """This file with its extents as the shard has them; None where it could not be that shard, contents apart."""
        if self.record.plan != shard.plan or shard.shared:
            return None
        if shard.floating:
            equal = len(self.ordered) == len(shard.extents) and all(extent.content for extent in self.ordered)
            return self if equal else None
        # placed by a format that may add to it (zarr), the record has more extents than the layout
        joined = join_records(self.ordered, shard.extents)
        return None if joined is None else replace(self, ordered=joined)


@dataclass(frozen=True, slots=True)
class Previous:
    """An open, published checkpoint. The reader keeps retention away from it until the save is done with it."""

    reader: Reader
    files: Mapping[str, KnownFile]

    def candidate(self, shard: Shard) -> KnownFile | None:
        """The file that could be this shard."""
        known = self.files.get(shard.file)
        return known.fitted(shard) if known is not None else None


def files_of(manifest: Manifest) -> dict[str, KnownFile]:
    """The files of a checkpoint that another process wrote."""
    ordered: dict[str, list[ExtentRecord]] = {}
    files = {record.name: record for record in manifest.files}
    for component in manifest.components.values():
        for tensor in component.tensors.values():
            for part in tensor.parts if isinstance(tensor, ChunkedRecord) else ():
                extents = files[part.file].extents
                ordered.setdefault(part.file, []).extend(extents[i] for i in part.extents)
    return {
        # where places are fixed, what the format adds is an extent of the layout too
        name: KnownFile(
            record,
            tuple(ordered[name]) if record.plan and name in ordered else record.extents,
            tuple(files[base] for base in record.bases),
        )
        for name, record in files.items()
    }
