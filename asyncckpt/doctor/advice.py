"""``recommend`` turns what was measured into settings. It is pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asyncckpt.doctor.findings import Finding, Setting, Speeds
from asyncckpt.write.options import WriterOptions

_DEFAULT_SHARD_BYTES = 4 << 30
_MIN_SHARD_BYTES = 1 << 20
#: More threads are worth it where fewer reach less than this share of the best rate.
_WORTH = 0.9
#: The page cache must be this much faster than O_DIRECT, because it takes memory from the data loader's files.
_CACHE_PAYS = 1.5
_REMOTE_BEAT_SECONDS = 10.0
_REMOTE_TTL_SECONDS = 75.0


@dataclass(frozen=True, slots=True)
class Seen:
    """Holds what the recommendation depends on."""

    findings: Sequence[Finding]
    speeds: Speeds
    remote: bool
    direct: bool
    largest_file_bytes: int
    cores: int
    missing_parents: bool = False


def recommend(seen: Seen) -> tuple[Setting, ...]:
    """Return arguments of ``Checkpointer`` for this path, each with its reason."""
    speeds = seen.speeds
    direct = seen.direct and not _cache_is_faster(speeds)
    rates = speeds.direct if direct else speeds.buffered
    threads = writers(rates)
    found = [
        Setting("format", "safetensors", "few large files; zarr makes a directory an array", "files"),
        _codec(rates, threads, speeds.encoding, seen.cores),
        _shards(seen.largest_file_bytes),
    ]
    if seen.missing_parents:
        found.append(Setting("create_parents", True, "its parent directory does not exist yet", "run"))
    found += [
        Setting("threads", threads, _why_threads(rates, threads), "writer"),
        Setting("direct", direct, _why_direct(seen, direct), "writer"),
        _read_back(seen.findings),
    ]
    if seen.remote:
        reason = "another machine sees files up to a minute late here"
        found.append(Setting("beat_seconds", _REMOTE_BEAT_SECONDS, reason, "run.lease"))
        found.append(Setting("ttl_seconds", _REMOTE_TTL_SECONDS, reason, "run.lease"))
    return tuple(found)


def writers(rates: Mapping[int, float]) -> int:
    """Return the fewest threads that come close to the best rate, or the default where nothing was measured."""
    best = max(rates.values(), default=0.0)
    if not best:
        return WriterOptions().threads
    return min(threads for threads, rate in rates.items() if rate >= _WORTH * best)


def rate(value: float) -> str:
    """Format bytes a second for people."""
    return (
        f"{value / 1e9:.2f} GB/s"
        if value >= 1e9
        else f"{value / 1e6:.0f} MB/s"
        if value >= 1e7
        else f"{value / 1e6:.1f} MB/s"
    )


def _cache_is_faster(speeds: Speeds) -> bool:
    return max(speeds.buffered.values(), default=0.0) > _CACHE_PAYS * max(speeds.direct.values(), default=float("inf"))


def _codec(rates: Mapping[int, float], threads: int, encoding: float, cores: int) -> Setting:
    """Choose the codec. Where the disk is faster, ``auto`` gives way by itself, but its trials are wasted."""
    if not rates or not encoding:
        return Setting("codec", "none", "not measured; 'auto' pays where the disk is slow", "files")
    encoders = min(threads, cores)
    reason = f"the disk takes {rate(rates[threads])}, {encoders} x encoding {rate(encoding * encoders)}"
    return Setting("codec", "auto" if encoding * encoders > rates[threads] else "none", reason, "files")


def _shards(largest: int) -> Setting:
    if not largest:
        return Setting("shard_bytes", _DEFAULT_SHARD_BYTES, "the default: not measured", "files")
    if largest >= _DEFAULT_SHARD_BYTES:
        return Setting("shard_bytes", _DEFAULT_SHARD_BYTES, "the default: files of this size can be had", "files")
    power = max(_MIN_SHARD_BYTES, 1 << (largest.bit_length() - 1))
    return Setting("shard_bytes", power, f"files are at most {largest} bytes here", "files")


def _why_threads(rates: Mapping[int, float], threads: int) -> str:
    if not rates:
        return "the default: not measured"
    return ", ".join(f"{count}: {rate(value)}" for count, value in rates.items())


def _why_direct(seen: Seen, direct: bool) -> str:
    if not seen.direct:
        return "no O_DIRECT here"
    if not direct:
        return "the page cache is much faster here"
    return "leaves the page cache to the data loader"


def _read_back(findings: Sequence[Finding]) -> Setting:
    doubtful = [one.check for one in findings if one.check.startswith("fsync") and one.status in ("warning", "unsafe")]
    if doubtful:
        return Setting("read_back", True, f"because of {doubtful[0]}: read every byte back before publishing", "writer")
    return Setting("read_back", False, "fsync did what could be checked", "writer")
