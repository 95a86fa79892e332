"""A checkpoint is opened, parsed and checked once, then handed on to whoever reads from it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace as replaced
from typing import Self

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.json import MAX_STATE_BYTES, STATE_FILE
from asyncckpt.manifest.records import Manifest
from asyncckpt.manifest.spread import OwnComponent, SpreadFile
from asyncckpt.manifest.table import files_with_tensors
from asyncckpt.manifest.unread import UnreadComponents
from asyncckpt.protocols import Reader
from asyncckpt.read.damage import check_files, raise_damage
from asyncckpt.read.extents import read_record, read_small_file
from asyncckpt.types import MAX_EXTENT_BYTES, JsonValue


class OpenCheckpoint:
    """A checkpoint whose manifest has been parsed, and whose files are there with the sizes that it lists.

    Whoever finds a checkpoint makes one of these, and everything on the way back takes it. Nothing is opened, parsed or
    checked a second time, so nothing can change in between. Retention spares the checkpoint until ``close``.
    ``reader`` is thread-safe; the rest is for one thread. ``reading_seconds``: how long ``fill`` has taken to read,
    verify and copy tensors.
    """

    def __init__(self, reader: Reader, manifest: Manifest) -> None:
        self.reader = reader
        self.manifest = manifest
        self.reading_seconds = 0.0
        self._small_files_are_checked = False
        self._state: bytes | None = None

    @property
    def name(self) -> str:
        """Return the directory's name."""
        return self.reader.name

    @property
    def path(self) -> str:
        """Return the directory's path, which messages begin with."""
        return self.reader.path

    def require_digest(self, expect_digest: str | None) -> None:
        """Refuse a manifest that is not the one expected. Raises ``DigestMismatch``, and ``InvalidOption`` for what is
        no SHA-256."""
        manifests.check_digest(self.manifest, expect_digest, self.path)

    def read_components(self) -> None:
        """Parse the manifest's components, where that was put off. Raises ``ManifestInvalid``."""
        if isinstance(self.manifest.components, UnreadComponents):
            self.manifest = replaced(self.manifest, components=self.manifest.components.read())

    def check_small_files(self) -> None:
        """Verify the files that hold no tensors, but for assets, which no state depends on; the second call does
        nothing. Blocks. Raises ``CheckpointDamaged``."""
        if self._small_files_are_checked:
            return
        components = self.manifest.components.values()
        apart = {file for component in components for file in files_with_tensors(component)}
        apart.update(self.manifest.assets)
        if self.manifest.parts is not None:  # each is verified when something is asked of it
            apart.update(self.manifest.parts.names())
        for record in self.manifest.files:
            if record.name not in apart and not isinstance(record, SpreadFile):
                data = read_record(self.reader, self.manifest, record, MAX_STATE_BYTES)
                if record.name == STATE_FILE:
                    self._state = data
        self._small_files_are_checked = True

    def assets(self) -> dict[str, bytes]:
        """Read the assets, each verified, by name. Blocks. Raises ``CheckpointDamaged``."""
        records = {record.name: record for record in self.manifest.files}
        return {
            name: read_record(self.reader, self.manifest, records[name], MAX_EXTENT_BYTES)
            for name in self.manifest.assets
        }

    @functools.cached_property
    def trees(self) -> Mapping[str, JsonValue]:
        """Return the plain values of every component. Blocks the first time, when they are verified and parsed, and
        where a part of the manifest has those of a rank's own component. Raises ``CheckpointDamaged``."""
        self.check_small_files()
        data, self._state = self._state, None
        if data is None:
            data = read_small_file(self.reader, self.manifest, STATE_FILE, MAX_STATE_BYTES)
        trees = jsontree.loads(data, f"{self.path}/{STATE_FILE}")
        if not isinstance(trees, dict):
            raise CheckpointDamaged(f"{self.path}/{STATE_FILE} is no JSON object")
        if self.manifest.parts is None:
            return trees
        components = self.manifest.components.items()
        return _Trees(trees, {name: one for name, one in components if isinstance(one, OwnComponent)})

    def close(self) -> None:
        """Let retention have the checkpoint again. Idempotent."""
        self.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Trees(Mapping[str, JsonValue]):
    """Maps the names of components to their plain values, of which those in ``own`` are read when asked for."""

    def __init__(self, read: Mapping[str, JsonValue], own: Mapping[str, OwnComponent]) -> None:
        self._read = read
        self._own = own

    def __getitem__(self, name: str) -> JsonValue:
        return self._own[name].values() if name in self._own else self._read[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._read
        yield from (name for name in self._own if name not in self._read)

    def __len__(self) -> int:
        return len(self._read.keys() | self._own.keys())


def open_checkpoint(reader: Reader, expect_digest: str | None = None, *, compare_files: bool = True) -> OpenCheckpoint:
    """Parse the manifest of what ``reader`` has open, and compare the names and sizes of its files with it.
    ``compare_files``: False where another rank of the job does that; what is read is verified all the same.

    Blocks. Raises ``CheckpointDamaged``, ``VersionUnsupported`` and, before anything in another manifest is looked at,
    ``DigestMismatch``; it closes the reader then.
    """
    try:
        manifest = manifests.load(reader, expect_digest)
        if compare_files:
            raise_damage(reader.path, check_files(reader, manifest).damage)
    except BaseException:
        reader.close()
        raise
    return OpenCheckpoint(reader, manifest)
