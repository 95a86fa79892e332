"""The previous checkpoint, as far as the next save can take its files over: what is equal is not written again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from asyncckpt import forks
from asyncckpt.errors import AsyncCkptError, CheckpointNotFound
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.records import ChunkedRecord, ExtentRecord, FileRecord, Manifest, join_records
from asyncckpt.protocols import Reader, Store
from asyncckpt.types import Shard

log = logging.getLogger("asyncckpt")

#: Names of checkpoints, newest first, that may be tried: older ones are not worth it.
_REMEMBERED = 4


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


class ReuseSource:
    """Of each kind of checkpoint, the newest that can be used, for the next save to take files over from. Thread-safe.

    ``quarantined``: names of checkpoints that were found damaged.
    """

    def __init__(self, store: Store, quarantined: Container[str]) -> None:
        self._store = store
        self._quarantined = quarantined
        self._lock = threading.Lock()
        #: By kind: names, the newest last, and the files of those that this process has written or read.
        self._known: dict[str, list[tuple[str, Mapping[str, KnownFile] | None]]] = {}

    def learn(self, kind: str, name: str, files: Mapping[str, KnownFile] | None = None) -> None:
        """This one is the newest now. ``files``: what is in it, where that is known already."""
        with self._lock:
            others = [one for one in self._known.get(kind, ()) if one[0] != name]
            self._known[kind] = [*others, (name, files)][-_REMEMBERED:]

    def forget(self, kind: str) -> None:
        """Take nothing over from any of these: the next save writes everything."""
        with self._lock:
            self._known.pop(kind, None)

    def open(self, kind: str) -> Previous | None:
        """The newest checkpoint of that kind that is still there and was not found damaged. Blocks on the disk. Never
        raises: without one, everything is written."""
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

    def _opened(self, name: str, files: Mapping[str, KnownFile] | None) -> Previous:
        reader = self._store.open(name)
        try:
            forks.disarm_in_child(reader)  # a forked child does not have it open
            return Previous(reader, files if files is not None else files_of(manifests.load(reader)))
        except BaseException:
            reader.close()
            raise
