"""The shard formats are known by name."""

from __future__ import annotations

from asyncckpt.errors import UnknownName
from asyncckpt.formats.safetensors import SafetensorsFormat
from asyncckpt.formats.zarr import ZarrFormat
from asyncckpt.protocols import ShardFormat

_TABLE: dict[str, ShardFormat] = {"safetensors": SafetensorsFormat(), "zarr": ZarrFormat()}


def get(name: str) -> ShardFormat:
    """Return the format of that name. Raises ``UnknownName``."""
    found = _TABLE.get(name)
    if found is None:
        raise UnknownName(f"unknown format {name!r}; known are {', '.join(_TABLE)}")
    return found
