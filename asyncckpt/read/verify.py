"""Verifies a checkpoint: every byte of every file is compared with the manifest's digests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence

from asyncckpt.errors import CheckpointDamaged, InvalidOption
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.json import FILE_NAME
from asyncckpt.manifest.parse import is_component_name
from asyncckpt.manifest.records import ExtentRecord, FileRecord, Manifest
from asyncckpt.manifest.spread import SpreadFile
from asyncckpt.protocols import Reader
from asyncckpt.read.consistency import check_views
from asyncckpt.read.damage import Damage, check_files
from asyncckpt.read.extents import read_extents
from asyncckpt.state.rank_names import without_rank

Progress = Callable[[int, int], None]


def verify(
    reader: Reader, *, progress: Progress | None = None, expect_digest: str | None = None, require: Sequence[str] = ()
) -> list[Damage]:
    """Read every byte past the page cache, check it, and return the damage: an empty list means that all is good.

    ``progress(done_bytes, total_bytes)`` is called from reader threads. Safe on a hostile directory: nothing is
    executed, links are not followed, files that the manifest does not list are not read, and memory stays within 1 GiB
    and what the manifest's text takes. A manifest that is not the one expected (``expect_digest``), and one that lists
    none of a component in ``require``, is damage. Raises
    only ``CheckpointNotFound``, ``VersionUnsupported``, ``MissingExtra`` (the digests' package), ``MemoryError``, and
    ``OSError`` where the directory cannot be listed.
    """
    try:
        manifest = manifests.load(reader, expect_digest)
        damage = check_files(reader, manifest).damage
    except CheckpointDamaged as error:
        return [Damage(FILE_NAME, 0, 0, str(error))]
    broken = {entry.file for entry in damage}
    total = sum(record.nbytes for record in manifest.files)
    done = 0

    def consume(_file: FileRecord, extent: ExtentRecord, _view: memoryview) -> None:
        nonlocal done
        done += extent.nbytes
        if progress is not None:
            progress(min(done, total), total)

    for records in _groups(manifest, broken):
        try:
            wanted = [(record, extent) for record in records for extent in record.extents]
        except CheckpointDamaged as error:  # a part of the manifest, which is among the files, too
            broken_file = records[0].name
            damage.append(Damage(broken_file, 0, records[0].nbytes, str(error)))
            continue
        damage += read_extents(reader, manifest.digest, wanted, consume, stop_at_damage=False)
    if not damage:
        damage += check_views(reader, manifest)
    damage += _missing_components(manifest, require)
    return sorted(damage, key=lambda entry: (entry.file, entry.offset))


def _groups(manifest: Manifest, broken: Collection[str]) -> Iterator[list[FileRecord]]:
    """Yield the files that can be read, those that one part of the manifest describes together: more than the extents
    of one part need not be in memory at once."""
    good = [record for record in manifest.files if record.name not in broken]
    yield [record for record in good if not isinstance(record, SpreadFile)]
    spread = [record for record in good if isinstance(record, SpreadFile)]
    for _, records in itertools.groupby(spread, key=lambda record: record.rank):
        yield list(records)


def required_components(require: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of components that a checkpoint must have. Raises ``InvalidOption`` for what is no name."""
    names = (require,) if isinstance(require, str) else require
    if not isinstance(names, Sequence) or not all(isinstance(name, str) and name for name in names):
        raise InvalidOption(f"require takes names of components, such as ('model', 'optimizer'), not {require!r:.80}")
    for name in names:
        if not is_component_name(name):
            raise InvalidOption(
                f"require: {name!r} can be no component's name; components are the keys of the saved state, such as "
                f"'model'"
            )
    return tuple(dict.fromkeys(names))


def _missing_components(manifest: Manifest, require: Sequence[str]) -> list[Damage]:
    """Find the components of which no rank has saved anything."""
    there = {without_rank(name) for name in manifest.components}
    listed = ", ".join(sorted(there)) or "none"
    return [
        Damage(FILE_NAME, 0, 0, f"the checkpoint ({manifest.kind}) has no component {name!r}; it has: {listed}")
        for name in require
        if name not in there
    ]
