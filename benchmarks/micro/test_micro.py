"""These benchmarks measure the engine's small parts one by one: ``pytest benchmarks/micro -m bench``."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from asyncckpt import formats
from asyncckpt.codecs import codecs, digests
from asyncckpt.manifest import json as manifest
from asyncckpt.manifest.records import ComponentRecord, ExtentRecord, FileRecord, Manifest, TensorRecord
from asyncckpt.plan import layout
from asyncckpt.types import Layout, LayoutOptions, TensorSpec

pytestmark = pytest.mark.bench

CHUNK_BYTES = 16 << 20
#: This is several times the largest last-level cache.
ARENA_BYTES = 1 << 30
TENSORS = 100_000


def extents() -> Iterator[memoryview]:
    """Yield aligned, faulted-in 16 MiB pieces of ``ARENA_BYTES``, round and round, so that they come from memory and
    not from the CPU's cache."""
    view = memoryview(mmap.mmap(-1, ARENA_BYTES))
    view[:] = np.random.default_rng(0).bytes(ARENA_BYTES)
    return itertools.cycle([view[at : at + CHUNK_BYTES] for at in range(0, ARENA_BYTES, CHUNK_BYTES)])


def record_throughput(benchmark: BenchmarkFixture, nbytes: int) -> None:
    if benchmark.stats is not None:  # there are none with --benchmark-disable
        benchmark.extra_info["gb_per_second"] = round(nbytes / benchmark.stats.stats.median / 1e9, 2)


def timed(benchmark: Any, function: Callable[..., Any], *args: object) -> Any:
    """Measure three rounds of something that takes a second: pytest-benchmark's calibration would take minutes."""
    return benchmark.pedantic(function, args=args, rounds=3)


@pytest.mark.parametrize("name", ["xxh3-128", "crc32c", "blake3", "sha256"])
@pytest.mark.benchmark(group="digest of 16 MiB")
def test_digest(benchmark: BenchmarkFixture, name: str) -> None:
    digest = digests.get(name)
    pieces = extents()
    benchmark(lambda: digest(next(pieces)))
    record_throughput(benchmark, CHUNK_BYTES)


@pytest.mark.benchmark(group="copy of 16 MiB")
def test_memcpy(benchmark: BenchmarkFixture) -> None:
    addresses = (ctypes.addressof(ctypes.c_char.from_buffer(piece)) for piece in extents())
    benchmark(lambda: ctypes.memmove(next(addresses), next(addresses), CHUNK_BYTES))
    record_throughput(benchmark, CHUNK_BYTES)


@pytest.mark.benchmark(group="layout of 100,000 tensors")
def test_layout_planned_anew(benchmark: BenchmarkFixture) -> None:
    planned = timed(benchmark, planned_layout, components())
    assert planned.nbytes > TENSORS * 4096


@pytest.mark.benchmark(group="layout of 100,000 tensors")
def test_layout_from_the_cache(benchmark: BenchmarkFixture) -> None:
    cache = layout.LayoutCache(formats.get("safetensors"), codecs.get("none"), LayoutOptions())
    first = cache.get(components())
    assert timed(benchmark, cache.get, components()) is first


@pytest.mark.benchmark(group="manifest of 100,000 tensors")
def test_manifest_encode(benchmark: BenchmarkFixture) -> None:
    drafted = drafted_manifest(planned_layout(components()))
    encoded = timed(benchmark, manifest.encode, drafted)
    benchmark.extra_info["nbytes"] = len(encoded)


@pytest.mark.benchmark(group="manifest of 100,000 tensors")
def test_manifest_decode(benchmark: BenchmarkFixture) -> None:
    drafted = drafted_manifest(planned_layout(components()))
    decoded = timed(benchmark, manifest.decode, manifest.encode(drafted), "benchmark")
    assert decoded.components == drafted.components


def components() -> layout.Components:
    specs = tuple(TensorSpec(f"blocks.{i}.weight", "F32", (32, 32), 4096) for i in range(TENSORS))
    return (("model", specs),)


def planned_layout(parts: layout.Components) -> Layout:
    return layout.plan(parts, formats.get("safetensors"), codecs.get("none"), LayoutOptions())


def drafted_manifest(planned: Layout) -> Manifest:
    tensors = {
        p.spec.name: TensorRecord(p.spec.dtype, p.spec.shape, shard.file, p.begin, p.end)
        for shard in planned.shards
        for p in shard.placements
    }
    files = [
        FileRecord(shard.file, shard.nbytes, tuple(ExtentRecord(e.offset, e.nbytes, "0" * 32) for e in shard.extents))
        for shard in planned.shards
    ]
    return Manifest(
        step=1,
        name="step-00000001",
        attempt="0" * 32,
        kind="full",
        created_unix_seconds=time.time(),
        world_size=1,
        shard_format="safetensors",
        digest=digests.DEFAULT,
        layout=planned.fingerprint,
        metrics={},
        config=None,
        environment={},
        files=tuple(files),
        components={"model": ComponentRecord("module", tensors, {})},
    )
