"""Describes what is wrong with a checkpoint, file by file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from asyncckpt.errors import CheckpointDamaged
from asyncckpt.manifest.records import Manifest
from asyncckpt.protocols import NOT_REGULAR, Reader
from asyncckpt.types import MANIFEST_FILE


@dataclass(frozen=True, slots=True)
class Damage:
    """Says one thing that is wrong with a checkpoint: in which file, where in it (in bytes), and what."""

    file: str
    offset: int
    nbytes: int
    problem: str

    def __str__(self) -> str:
        return f"{self.file} [{self.offset}:{self.offset + self.nbytes}]: {self.problem}"


class FileCheck(NamedTuple):
    """Holds what a look at a checkpoint's files has found. ``damage``: what is wrong with the files that the manifest
    lists. ``extra``: the names of whatever else lies there. Somebody else has put it there, and nobody reads it, so it
    is no damage."""

    damage: list[Damage]
    extra: tuple[str, ...]


def check_files(reader: Reader, manifest: Manifest) -> FileCheck:
    """Compare names and sizes with the manifest: find the files that are missing, resized or no regular files, and
    those that the manifest does not list. Reads no data."""
    found = reader.files()
    damage: list[Damage] = []
    for record in manifest.files:
        size = found.pop(record.name, None)
        if size is None:
            damage.append(Damage(record.name, 0, record.nbytes, "the file is missing"))
        elif size == NOT_REGULAR:
            damage.append(Damage(record.name, 0, record.nbytes, "it is no regular file"))
        elif size != record.nbytes:
            damage.append(Damage(record.name, 0, record.nbytes, f"the file has {size} bytes, not {record.nbytes}"))
    size = found.pop(MANIFEST_FILE, None)
    if size != manifest.size_bytes:  # a reader keeps the manifest open: the file that it read may be gone by now
        problem = "the file is missing" if size is None else "it is not the file that was read"
        damage.append(Damage(MANIFEST_FILE, 0, manifest.size_bytes, problem))
    return FileCheck(damage, tuple(sorted(found)))


def raise_damage(path: str, damage: Sequence[Damage], consequence: str = "") -> None:
    """Raise ``CheckpointDamaged`` that names the first few damages; do nothing where there are none. ``consequence``
    ends the message."""
    if damage:
        shown = "; ".join(str(entry) for entry in damage[:3])
        more = f" and {len(damage) - 3} more" if len(damage) > 3 else ""
        raise CheckpointDamaged(f"{path}: {shown}{more}.{consequence}")
