"""Tests that combine options of a ``Checkpointer`` name them without caring where each belongs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from asyncckpt import RankOptions, RunOptions, Safetensors, StagingOptions, WriterOptions, Zarr

_FILES = {name: name for name in ("codec", "delta", "shard_bytes", "per_rank")}
_STAGING = {name: name for name in ("on_busy", "max_in_flight", "stall_timeout_seconds")} | {
    "staging_bytes": "budget_bytes"
}
_WRITER = {name: name for name in ("threads", "direct", "digest", "read_back", "durable_timeout_seconds")} | {
    "incremental": "reuse_unchanged"
}
_RUN = {name: name for name in ("name", "create_parents", "overwrite", "takeover", "lease")}


def by_stage(**flat: Any) -> dict[str, Any]:
    """Turn options such as ``format="zarr"``, ``staging_bytes=1 << 20`` and ``incremental=False`` into what
    ``Checkpointer`` takes."""

    def take(names: dict[str, str]) -> dict[str, Any]:
        return {new: flat.pop(old) for old, new in names.items() if old in flat}

    shard_format = flat.pop("format", "safetensors")
    if shard_format not in ("safetensors", "zarr"):
        flat["files"] = shard_format
    zarr = shard_format == "zarr"
    files = take(_FILES | {"extent_bytes": "chunk_bytes" if zarr else "extent_bytes"})
    if zarr and files.get("delta") is None:
        files.pop("delta", None)
    if zarr or files:
        flat["files"] = (Zarr if zarr else Safetensors)(**files)
    for name, kind, names in (
        ("staging", StagingOptions, _STAGING),
        ("writer", WriterOptions, _WRITER),
        ("run", RunOptions, _RUN),
    ):
        given = take(names)
        if given:
            flat[name] = replace(flat.get(name) or kind(), **given)
    ranks = take({name: name for name in ("check_replicas", "manifest_rows")})
    if ranks:
        flat["ranks"] = replace(flat.get("ranks") or RankOptions(), **ranks)
    return flat
