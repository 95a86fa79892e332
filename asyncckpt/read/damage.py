"""Describes what is wrong with a checkpoint, file by file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asyncckpt.errors import CheckpointDamaged
from asyncckpt.manifest.records import Manifest
from asyncckpt.protocols import Reader
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


def check_files(reader: Reader, manifest: Manifest) -> list[Damage]:
    """Compare names and sizes with the manifest, and return the missing, unlisted and resized files. Reads no data."""
    found = reader.files()
    damage: list[Damage] = []
    for record in manifest.files:
        size = found.pop(record.name, None)
        if size is None:
            damage.append(Damage(record.name, 0, record.nbytes, "the file is missing"))
        elif size != record.nbytes:
            damage.append(Damage(record.name, 0, record.nbytes, f"the file has {size} bytes, not {record.nbytes}"))
    size = found.pop(MANIFEST_FILE, None)
    if size != manifest.size_bytes:  # a reader keeps the manifest open: the file that it read may be gone by now
        problem = "the file is missing" if size is None else "it is not the file that was read"
        damage.append(Damage(MANIFEST_FILE, 0, manifest.size_bytes, problem))
    damage.extend(Damage(name, 0, size, "the manifest does not list this file") for name, size in found.items())
    return damage


def raise_damage(path: str, damage: Sequence[Damage], consequence: str = "") -> None:
    """Raise ``CheckpointDamaged`` that names the first few damages; do nothing where there are none. ``consequence``
    ends the message."""
    if damage:
        shown = "; ".join(str(entry) for entry in damage[:3])
        more = f" and {len(damage) - 3} more" if len(damage) > 3 else ""
        raise CheckpointDamaged(f"{path}: {shown}{more}.{consequence}")
