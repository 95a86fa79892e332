"""Digest algorithms are known by name, and the manifest records the name, so that any reader knows how to check.

``xxh3-128`` is the default: it hashes faster than the disk, the bus and a memory copy (docs/design/002-digests.md has
the figures). ``blake3`` and ``sha256`` are cryptographic. ``crc32c`` is what object stores and zarr's sharding use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import google_crc32c
import numpy as np
import xxhash

from asyncckpt.errors import MissingExtra, UnknownName
from asyncckpt.protocols import Digest
from asyncckpt.types import Buffer

DEFAULT = "xxh3-128"
#: The library keeps the interpreter for buffers of up to 100 kB.
_KEPT_BYTES = 64 << 10
#: Hashing so much takes 40 µs; to give the interpreter up and get it back beside a busy thread takes milliseconds.
_SHORT_BYTES = 1 << 20


def _xxh3() -> Digest:
    def digest(*parts: Buffer) -> str:
        if len(parts) > 1:
            return _updated(xxhash.xxh3_128(), parts)
        view = memoryview(parts[0])
        if not _KEPT_BYTES < view.nbytes <= _SHORT_BYTES or view.itemsize != 1:
            return str(xxhash.xxh3_128_hexdigest(view))
        slices = (view[begin : begin + _KEPT_BYTES] for begin in range(0, view.nbytes, _KEPT_BYTES))
        return _updated(xxhash.xxh3_128(), slices)

    return digest


def _sha256() -> Digest:
    return lambda *parts: _updated(hashlib.sha256(), parts)


def _blake3() -> Digest:
    try:
        from blake3 import blake3
    except ImportError as error:
        raise _missing("blake3") from error
    return lambda *parts: _updated(blake3(), parts)


def _updated(hasher: Any, parts: Iterable[Buffer]) -> str:
    for part in parts:
        hasher.update(part)
    return str(hasher.hexdigest())


def _crc32c() -> Digest:
    def digest(*parts: Buffer) -> str:
        value = 0
        for part in parts:
            # the library refuses memoryviews; it takes an array over the same memory and hashes it without the GIL
            value = google_crc32c.extend(value, np.frombuffer(part, dtype=np.uint8))
        return f"{value:08x}"

    return digest


def _missing(name: str) -> MissingExtra:
    return MissingExtra(f"digest {name!r} needs an optional package: pip install 'asyncckpt[hashes]'")


_TABLE: dict[str, tuple[Callable[[], Digest], int]] = {
    "xxh3-128": (_xxh3, 32),
    "blake3": (_blake3, 64),
    "crc32c": (_crc32c, 8),
    "sha256": (_sha256, 64),
}


_CRYPTOGRAPHIC = frozenset({"blake3", "sha256"})


def names() -> list[str]:
    """Return the names of all algorithms."""
    return list(_TABLE)


def get(name: str) -> Digest:
    """Return the digest function of that name.

    Raises ``UnknownName`` for a name that is not in the table (a name in a file never makes anything load) and
    ``MissingExtra`` where its package is not installed.
    """
    row = _TABLE.get(name)
    if row is None:
        raise UnknownName(f"unknown digest algorithm {name!r}; known are {', '.join(_TABLE)}")
    return row[0]()


def second(name: str) -> Digest | None:
    """Return the digest that must agree, too, before contents with equal digests of algorithm ``name`` are taken for
    equal: one of 128 bits where ``name`` has fewer, or None where it has enough. Raises ``UnknownName``."""
    return get(DEFAULT) if hex_length(name) < hex_length(DEFAULT) else None


def is_cryptographic(name: str) -> bool:
    """Return whether nobody can make other bytes with the same digest on purpose."""
    return name in _CRYPTOGRAPHIC


def hex_length(name: str) -> int:
    """Return how many hex digits a digest of that algorithm has. Raises ``UnknownName``."""
    if name not in _TABLE:
        raise UnknownName(f"unknown digest algorithm {name!r}; known are {', '.join(_TABLE)}")
    return _TABLE[name][1]
