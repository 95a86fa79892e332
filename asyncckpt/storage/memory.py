"""``memory://name``: a run in this process's memory, for tests and for trying things out. It goes with the process."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping

from asyncckpt.storage.objects import ObjectStore

_buckets: dict[str, MemoryBucket] = {}
_buckets_lock = threading.Lock()


class MemoryBucket:
    """A bucket that is a dictionary. Thread-safe."""

    def __init__(self, address: str = "memory://") -> None:
        self.address = address
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, int]] = {}
        self._versions = itertools.count(1)

    def create(self, key: str, data: bytes) -> None:
        with self._lock:
            if key in self._objects:
                raise FileExistsError(f"{self.address}/{key} already exists")
            self._objects[key] = bytes(data), next(self._versions)

    def replace(self, key: str, data: bytes) -> None:
        with self._lock:
            self._objects[key] = bytes(data), next(self._versions)

    def writer(self, key: str, nbytes: int) -> _MemoryWriter:
        return _MemoryWriter(self, key, nbytes)

    def read(self, key: str, nbytes: int, offset: int) -> memoryview:
        with self._lock:
            found = self._objects.get(key)
        if found is None:
            raise FileNotFoundError(f"{self.address}/{key} is not there")
        return memoryview(found[0])[offset : offset + nbytes]

    def listing(self, prefix: str) -> Mapping[str, tuple[int, int]]:
        with self._lock:
            found = list(self._objects.items())
        return {key: (len(data), version) for key, (data, version) in found if key.startswith(prefix)}

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(key, None)


class _MemoryWriter:
    """Collects an object's bytes."""

    def __init__(self, bucket: MemoryBucket, key: str, nbytes: int) -> None:
        self._bucket = bucket
        self._key = key
        self._data = bytearray(nbytes)

    def write_at(self, data: memoryview, offset: int) -> None:
        self._data[offset : offset + len(data)] = data

    def finish(self, nbytes: int) -> None:
        self._bucket.create(self._key, bytes(memoryview(self._data)[:nbytes]))
        self._data = bytearray()

    def abort(self) -> None:
        self._data = bytearray()


class MemoryStore(ObjectStore):
    """A run in memory that nothing else knows of. ``open_store("memory://name")`` gives one that has a name."""

    def __init__(self, bucket: MemoryBucket | None = None) -> None:
        super().__init__(bucket or MemoryBucket())


def open_at(address: str, *, direct: bool) -> MemoryStore:
    """Open the run of that name, for ``open_store``; every call for one address gets the same objects."""
    with _buckets_lock:
        return MemoryStore(_buckets.setdefault(address, MemoryBucket(address)))
