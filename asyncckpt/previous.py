"""The previous checkpoint, as far as the next save can take its files over: what is equal is not written again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from asyncckpt.protocols import Reader, Shard
from asyncckpt.records import ChunkedRecord, ExtentRecord, FileRecord, Manifest


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A file of the previous checkpoint; ``ordered`` are its extents in the order of the layout that it was made by
    (what a format adds around them is only in the record)."""

    record: FileRecord
    ordered: tuple[ExtentRecord, ...]
    bases: tuple[FileRecord, ...] = ()

    @property
    def layers(self) -> tuple[FileRecord, ...]:
        """The files that together give its data."""
        return (*self.bases, self.record)

    def fits(self, shard: Shard) -> bool:
        """Whether it could be this shard, contents apart."""
        if self.record.plan != shard.plan or len(self.ordered) != len(shard.extents):
            return False
        if shard.floating:
            return all(extent.content for extent in self.ordered)
        return all(
            (old.offset, old.nbytes) == (new.offset, new.nbytes)
            for old, new in zip(self.ordered, shard.extents, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Previous:
    """An open, published checkpoint. The reader keeps retention away from it until the save is done with it."""

    reader: Reader
    files: Mapping[str, KnownFile]

    def candidate(self, shard: Shard) -> KnownFile | None:
        """The file that could be this shard."""
        known = self.files.get(shard.file)
        return known if known is not None and known.fits(shard) else None


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
