"""What is wrong with a checkpoint, file by file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asyncckpt.errors import CheckpointDamaged
from asyncckpt.manifest.records import Manifest
from asyncckpt.protocols import Reader
from asyncckpt.types import MANIFEST_FILE


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing wrong with a checkpoint: which file, where in it (bytes), and what."""

    file: str
    offset: int
    nbytes: int
    problem: str

    def __str__(self) -> str:
        return f"{self.file} [{self.offset}:{self.offset + self.nbytes}]: {self.problem}"


def check_files(reader: Reader, manifest: Manifest) -> list[Damage]:
    """Names and sizes against the manifest: missing, unlisted and resized files. Reads no data."""
    found = reader.files()
    damage: list[Damage] = []
    for record in manifest.files:
        size = found.pop(record.name, None)
        if size is None:
            damage.append(Damage(record.name, 0, record.nbytes, "the file is missing"))
        elif size != record.nbytes:
            damage.append(Damage(record.name, 0, record.nbytes, f"the file has {size} bytes, not {record.nbytes}"))
    found.pop(MANIFEST_FILE, None)
    damage.extend(Damage(name, 0, size, "the manifest does not list this file") for name, size in found.items())
    return damage


def raise_damage(path: str, damage: Sequence[Damage], consequence: str = "") -> None:
    """Raise ``CheckpointDamaged`` naming the first few damages; returns where there are none."""
    if damage:
        shown = "; ".join(str(entry) for entry in damage[:3])
        more = f" and {len(damage) - 3} more" if len(damage) > 3 else ""
        raise CheckpointDamaged(f"{path}: {shown}{more}.{consequence}")
