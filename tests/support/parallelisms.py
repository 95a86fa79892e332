"""One state is saved in every way, and the SHA-256 of what lies on the disk then is compared."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import asyncckpt
from support.harness import Me
from support.options import by_stage
from support.sharded_states import build

#: Each entry is ``format/codec``.
FORMATS = ("safetensors/none", "zarr/none", "safetensors/planes", "zarr/planes")
#: The sizes are small, so that a small state has many extents and shards.
SIZES: Mapping[str, Any] = {"extent_bytes": 64 << 10, "shard_bytes": 2 << 20}
TIMEOUT = asyncckpt.RankOptions(timeout_seconds=30)


def hash_of(path: str) -> str:
    """Hash all files of a checkpoint that hold tensors or metadata of tensors, names included."""
    found = hashlib.sha256()
    for file in sorted(Path(path).rglob("*")):
        name = str(file.relative_to(path))
        if file.is_file() and name not in ("manifest.json", "state.json"):
            found.update(f"{name}\0{file.stat().st_size}\0".encode())
            found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def save_in_each(me: Me, folder: str, parallelism: str, formats: tuple[str, ...]) -> dict[str, str]:
    """Save in each format; map it to the hash of the data files, or to ``refused: …`` where it cannot save in this
    way."""
    state = build(parallelism, me.rank, me.size)
    found: dict[str, str] = {}
    for one in formats:
        kind, _, codec = one.partition("/")
        path = os.path.join(folder, one.replace("/", "-"))
        with asyncckpt.Checkpointer(path, **by_stage(format=kind, codec=codec, ranks=TIMEOUT, **SIZES)) as run:
            try:
                report = run.save(1, state).result(60)
            except asyncckpt.UnsupportedValue as error:
                found[one] = f"refused: {error}"
                continue
        found[one] = hash_of(report.path) if me.rank == 0 else ""
    return found
