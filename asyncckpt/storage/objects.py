"""A run in a bucket: objects that appear whole, small ones that are created where there is none, ranged reads, listing.

A backend for another kind of bucket is a class with the six methods of ``Bucket``. A checkpoint's files are the objects
``<name>/<file>``. Every one of them is only ever created, never replaced, so that an attempt that was cut off cannot
change another's files; the manifest comes last, and makes a checkpoint of them. ``.pending/<uuid>`` names what is being
written or deleted: where the manifest is not there, its objects are leftovers.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Mapping
from typing import Protocol

from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound, SaveFailed, StepExists
from asyncckpt.protocols import Capability, FileInfo, PendingDirectory, Reader, ShardWriter
from asyncckpt.storage.object_lease import ObjectLease, read_record
from asyncckpt.types import MANIFEST_FILE, Buffer, Holder, LeaseOptions

_PENDING = ".pending/"


class ObjectWriter(Protocol):
    """One object being written. Thread-safe; nothing of it is there before ``finish``."""

    def write_at(self, data: memoryview, offset: int) -> None:
        """Take over these bytes, which begin at ``offset`` of the object."""

    def finish(self, nbytes: int) -> None:
        """Create the object of so many bytes, durably. Raises ``FileExistsError`` where there is one."""

    def abort(self) -> None:
        """Forget what was written. Idempotent; never raises."""


class Bucket(Protocol):
    """What a backend has to do for ``ObjectStore``. Thread-safe; every call may block on the network. Keys are relative
    to the run; what a call has stored, every later call of any process sees."""

    address: str

    def create(self, key: str, data: bytes) -> None:
        """Store a small object, durably. Raises ``FileExistsError`` where there is one: only one of several callers
        succeeds."""

    def replace(self, key: str, data: bytes) -> None:
        """Store a small object, whether there is one or not."""

    def writer(self, key: str, nbytes: int) -> ObjectWriter:
        """Begin an object of at most ``nbytes``."""

    def read(self, key: str, nbytes: int, offset: int) -> bytes | memoryview:
        """Return up to ``nbytes`` from ``offset`` on; fewer only at the object's end. Raises ``FileNotFoundError``."""

    def listing(self, prefix: str) -> Mapping[str, tuple[int, int]]:
        """Return the keys that begin with ``prefix``, each with its size in bytes and a number that another object of
        that name would not have."""

    def delete(self, key: str) -> None:
        """Delete an object. Does nothing where there is none."""


class ObjectStore:
    """Keeps a run in a bucket. Thread-safe. It has none of the capabilities: a step is not saved again under a name
    that is taken, unchanged files are written again rather than linked, and each rank writes files of its own."""

    capabilities: frozenset[Capability] = frozenset()

    def __init__(self, bucket: Bucket) -> None:
        self.address = bucket.address
        self._bucket = bucket

    def prepare(self, *, create_parents: bool = False) -> None:
        """Do nothing: a bucket has no directories."""

    def hold(self, *, takeover: bool = False, options: LeaseOptions | None = None) -> ObjectLease:
        return ObjectLease.acquire(self._bucket, takeover=takeover, options=options or LeaseOptions())

    def holder(self) -> Holder | None:
        return read_record(self._bucket)

    def reclaim(self) -> list[str]:
        found: list[str] = []
        for marker, name in self._pending().items():
            if not self._bucket.listing(f"{name}/{MANIFEST_FILE}"):
                for key in self._bucket.listing(f"{name}/"):
                    self._bucket.delete(key)
                found.append(name)
            self._bucket.delete(marker)
        return found

    def free_bytes(self) -> int | None:
        return None

    def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
        (self._bucket.replace if replace else self._bucket.create)(key, data)

    def delete(self, key: str) -> None:
        self._bucket.delete(key)

    def names(self) -> list[str]:
        keys = self._bucket.listing("")  # before the markers: an attempt has its marker before it has an object
        pending = set(self._pending().values())
        found = {name for name, slash, _ in (key.partition("/") for key in keys) if slash and not name.startswith(".")}
        return [name for name in found if name not in pending or f"{name}/{MANIFEST_FILE}" in keys]

    def identity(self, name: str) -> int | None:
        keys = self._bucket.listing(name)
        for key in (f"{name}/{MANIFEST_FILE}", name):
            if key in keys:
                return keys[key][1]
        inside = [version for key, (_, version) in keys.items() if key.startswith(f"{name}/")]
        return min(inside) if inside else None

    def listing(self, name: str) -> Mapping[str, FileInfo]:
        prefix = f"{name}/" if name else ""
        found: dict[str, FileInfo] = {}
        for key, (nbytes, _) in self._bucket.listing(prefix).items():
            entry, slash, _ = key[len(prefix) :].partition("/")
            found[entry] = FileInfo(0, "folder") if slash else FileInfo(nbytes, "file")
        return found

    def begin(self, step: int, attempt: str, *, name: str, shared: bool = False) -> PendingDirectory:
        marker = _PENDING + attempt
        taken = bool(self._bucket.listing(f"{name}/"))
        begun = marker in self._bucket.listing(marker)
        if begun and not shared:
            raise FileExistsError(f"{self.address}/{marker} already exists: an attempt is never made twice")
        if taken and not begun:
            raise StepExists(
                f"{self.address}/{name} already exists, and this storage replaces nothing; it was left as it is (step "
                f"{step}). Save another step, or delete that one first"
            )
        with contextlib.suppress(FileExistsError):  # another rank came first
            self._bucket.create(marker, name.encode())
        return _PendingPrefix(self._bucket, name, attempt, shared=shared)

    def open(self, name: str) -> Reader:
        return _ObjectReader(self._bucket, name)

    def remove(self, name: str) -> bool:
        keys = self._bucket.listing(f"{name}/")
        if not keys:
            raise FileNotFoundError(f"{self.address}/{name} is not there")
        marker = f"{_PENDING}{uuid.uuid4().hex}"
        self._bucket.create(marker, name.encode())
        self._bucket.delete(f"{name}/{MANIFEST_FILE}")  # from here on it is no checkpoint
        for key in keys:
            self._bucket.delete(key)
        self._bucket.delete(marker)
        return True

    def _pending(self) -> dict[str, str]:
        """Return the markers, each with the name of the checkpoint that is being written or deleted."""
        found: dict[str, str] = {}
        for marker in self._bucket.listing(_PENDING):
            with contextlib.suppress(FileNotFoundError):  # published or discarded meanwhile
                found[marker] = bytes(self._bucket.read(marker, 4096, 0)).decode()
        return found


class _PendingPrefix:
    """Objects on their way to be a checkpoint. The manifest is kept until ``publish``: it makes one of them."""

    def __init__(self, bucket: Bucket, name: str, attempt: str, *, shared: bool) -> None:
        self.uuid = attempt
        self.path = f"{bucket.address}/{name}"
        self._bucket = bucket
        self._name = name
        self._shared = shared
        self._manifest: bytes | None = None
        self._writers: list[_ObjectShardWriter] = []
        self._lock = threading.Lock()
        self._done = False

    def create_shard(self, file: str, nbytes: int, *, shared: bool = False) -> ShardWriter:
        if shared:
            raise SaveFailed(f"{self.path}/{file}: this storage has no files that several ranks write into")
        writer = _ObjectShardWriter(self._bucket.writer(f"{self._name}/{file}", nbytes), f"{self.path}/{file}")
        with self._lock:
            self._writers.append(writer)
        return writer

    def link(self, source: Reader, file: str, nbytes: int, name: str) -> bool:
        if source.files_nbytes(file) != nbytes:
            raise CheckpointDamaged(
                f"{source.path}/{file} has another size than the {nbytes} bytes it was written with"
            )
        return False

    def write_small(self, files: Mapping[str, bytes]) -> None:
        for file, data in files.items():
            if file == MANIFEST_FILE:
                self._manifest = data
            else:
                self._bucket.create(f"{self._name}/{file}", data)

    def sync_directory(self) -> None:
        """Do nothing: what was created is durable, and has its name."""

    def open(self) -> Reader:
        return _ObjectReader(self._bucket, self._name, manifest=self._manifest)

    def publish(self, name: str, *, replace: bool) -> None:
        if self._manifest is None or name != self._name:
            raise SaveFailed(f"{self.path}: published without a manifest, or as {name}")
        try:
            self._bucket.create(f"{name}/{MANIFEST_FILE}", self._manifest)
        except FileExistsError as error:
            self._done = True
            raise StepExists(f"{self.path} already exists; it was left as it is. Save another step") from error
        self._done = True
        self._bucket.delete(_PENDING + self.uuid)

    def close(self) -> None:
        with self._lock:
            writers = list(self._writers)
        for writer in writers:
            writer.abort()

    def discard(self) -> None:
        self.close()
        if self._done:
            return
        self._done = True
        with contextlib.suppress(OSError):  # the next run deletes what is left
            for key in self._bucket.listing(f"{self._name}/"):
                self._bucket.delete(key)
            if not self._shared:  # other ranks may still write: the next run looks again
                self._bucket.delete(_PENDING + self.uuid)


class _ObjectShardWriter:
    """A shard that becomes an object when it is finished."""

    def __init__(self, writer: ObjectWriter, path: str) -> None:
        self._writer = writer
        self._path = path
        self._given_up = False

    def write_at(self, view: memoryview, nbytes: int, offset: int) -> None:
        if self._given_up:
            raise SaveFailed(f"{self._path}: written to after the attempt was given up")
        self._writer.write_at(view[:nbytes], offset)

    def finish(self, nbytes: int) -> None:
        self._writer.finish(nbytes)

    def abort(self) -> None:
        self._given_up = True
        self._writer.abort()


class _ObjectReader:
    """An open checkpoint in a bucket. Nothing keeps it from being deleted meanwhile: reading it fails then."""

    def __init__(self, bucket: Bucket, name: str, *, manifest: bytes | None = None) -> None:
        self.name = name
        self.path = f"{bucket.address}/{name}"
        self._bucket = bucket
        self._prefix = f"{name}/"
        self._manifest = manifest
        self._sizes = self.files()
        if not self._sizes:
            raise CheckpointNotFound(f"{self.path}: no such checkpoint")

    def files(self) -> dict[str, int]:
        found = self._bucket.listing(self._prefix)
        sizes = {key.removeprefix(self._prefix): nbytes for key, (nbytes, _) in found.items()}
        return sizes if self._manifest is None else {**sizes, MANIFEST_FILE: len(self._manifest)}

    def files_nbytes(self, file: str) -> int:
        if file not in self._sizes:
            raise CheckpointDamaged(f"{self.path}/{file} is missing")
        return self._sizes[file]

    def read_small(self, file: str, limit_bytes: int) -> bytes:
        if file == MANIFEST_FILE and self._manifest is not None:
            return self._manifest
        if self.files_nbytes(file) > limit_bytes:
            raise CheckpointDamaged(f"{self.path}/{file} has more than the limit of {limit_bytes} bytes")
        return bytes(self._read(file, limit_bytes, 0))

    def read_into(self, file: str, buffer: Buffer, nbytes: int, offset: int) -> int:
        data = self._read(file, nbytes, offset)
        memoryview(buffer)[: len(data)] = data
        return len(data)

    def _read(self, file: str, nbytes: int, offset: int) -> bytes | memoryview:
        try:
            return self._bucket.read(self._prefix + file, nbytes, offset)
        except FileNotFoundError as error:
            raise CheckpointDamaged(f"{self.path}/{file} is missing") from error

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def disarm(self) -> None:
        """Do nothing: nothing is inherited."""
