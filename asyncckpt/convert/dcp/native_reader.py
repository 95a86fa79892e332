"""``read_foreign`` reads checkpoints that plain ``torch.distributed.checkpoint`` wrote, without executing any pickle.

DCP's ``.metadata`` is a pickle, and each value is one too, inside what ``torch.save`` writes: see ``safe_unpickle``.
Tensors are views of the mapped files; nothing is copied before it is written.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import torch

from asyncckpt.convert.dcp.safe_unpickle import BytesStandIn, Inert, MetadataStandIn, tensor_in, unpickle, value_in
from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound, UnsupportedValue
from asyncckpt.integrations.dcp.names import Path

METADATA: Final = ".metadata"
#: The limit stops a forged size; a tensor's entry takes a few hundred bytes.
_MAX_METADATA_BYTES: Final = 2 << 30
_OPEN_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class ForeignBox:
    """A box is a part of a tensor as it lies in one of the files. ``tensor`` is a view of the mapped file, ``offsets``
    is the box's place in the whole tensor."""

    offsets: tuple[int, ...]
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class Foreign:
    """Holds the contents of a plain DCP checkpoint, by FQN. ``tensors`` have a shape and boxes, ``paths`` the keys an
    FQN was made of. ``skipped`` says why a value cannot be read without executing its pickle. ``files`` says by name
    what each file was when it was opened."""

    tensors: Mapping[str, tuple[tuple[int, ...], list[ForeignBox]]]
    values: Mapping[str, Any]
    paths: Mapping[str, Path]
    skipped: Mapping[str, str]
    files: Mapping[str, os.stat_result]


def read_foreign(path: str | os.PathLike[str]) -> Foreign:
    """Read a directory that ``dcp.save`` wrote with torch's own ``FileSystemWriter``.

    This is safe on a directory you do not trust: no class and no function of a pickle's choice is looked up, no link is
    followed, and every size is checked against the files. Such checkpoints have no digests: damage inside tensors
    cannot be seen. Raises ``CheckpointNotFound``, ``CheckpointDamaged`` naming what does not fit, and
    ``UnsupportedValue`` for extensions (compressed or transformed entries).
    """
    folder = os.fspath(path)
    files = _Files(folder)
    metadata = _metadata(files)
    stored = _by_place(_field(metadata, "storage_data", dict), folder)
    tensors: dict[str, tuple[tuple[int, ...], list[ForeignBox]]] = {}
    values: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for fqn, entry in _field(metadata, "state_dict_metadata", dict).items():
        if not isinstance(fqn, str) or not isinstance(entry, Inert):
            _fail(folder, f"has an entry {fqn!r:.80} that is none")
        if isinstance(entry, BytesStandIn):
            place = stored.get((fqn, None))
            if place is None:
                _fail(folder, f"says nothing of where {fqn!r:.80} is")
            try:
                values[fqn] = value_in(_slice(files, place), fqn)
            except UnsupportedValue as error:
                skipped[fqn] = str(error)
        else:
            shape = _sizes(entry, "size", fqn)
            tensors[fqn] = (
                shape,
                [_box(files, stored, fqn, shape, chunk) for chunk in _field(entry, "chunks", list)],
            )
    paths: dict[str, Path] = {}
    for fqn, keys in (metadata.fields.get("planner_data") or {}).items():
        if isinstance(keys, tuple) and all(type(key) in (str, int) for key in keys):
            paths[str(fqn)] = keys
    return Foreign(tensors, values, paths, skipped, files.opened)


# -- files -----------------------------------------------------------------------------------------------------------
def _fail(folder: str, problem: str) -> NoReturn:
    raise CheckpointDamaged(f"{folder}: its {METADATA} {problem}")


class _Files:
    """Opens the files of a directory, each once. ``opened``: what each was then."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.opened: dict[str, os.stat_result] = {}
        self._mapped: dict[str, memoryview] = {}

    def open(self, name: str) -> int:
        """Return a descriptor of the file, which is the caller's."""
        fd = _open(self.folder, name)
        self.opened[name] = os.fstat(fd)
        return fd

    def mapped(self, name: str) -> memoryview:
        """Return the bytes of the file."""
        if name not in self._mapped:
            fd = self.open(name)
            try:
                size = os.fstat(fd).st_size
                self._mapped[name] = memoryview(
                    mmap.mmap(fd, size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) if size else b""
                )
            finally:
                os.close(fd)
        return self._mapped[name]


def _metadata(files: _Files) -> Inert:
    folder = files.folder
    fd = files.open(METADATA)
    try:
        if os.fstat(fd).st_size > _MAX_METADATA_BYTES:
            _fail(folder, "is larger than any checkpoint needs")
        with os.fdopen(os.dup(fd), "rb") as file:
            data = file.read(_MAX_METADATA_BYTES)
    finally:
        os.close(fd)
    found = unpickle(data, f"{folder}/{METADATA}")
    if not isinstance(found, MetadataStandIn):
        _fail(folder, "is no Metadata")
    return found


def _open(folder: str, name: str) -> int:
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
        _fail(folder, f"names a file {name!r:.80} that is no plain one")
    try:
        fd = os.open(os.path.join(folder, name), _OPEN_FLAGS)
    except FileNotFoundError as error:
        if name == METADATA:
            raise CheckpointNotFound(
                f"{folder}: no checkpoint of torch.distributed.checkpoint ({name} is missing)"
            ) from error
        raise CheckpointDamaged(f"{folder}/{name} is missing") from error
    except OSError as error:
        raise CheckpointDamaged(f"{folder}/{name} is no regular file ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointDamaged(f"{folder}/{name} is no regular file")
    return fd


def _slice(files: _Files, place: Inert) -> memoryview:
    folder = files.folder
    name, offset, length = (place.fields.get(key) for key in ("relative_path", "offset", "length"))
    if place.fields.get("transform_descriptors"):
        raise UnsupportedValue(f"{folder}/{name}: written with transforms ({place.fields['transform_descriptors']})")
    if not isinstance(name, str) or type(offset) is not int or type(length) is not int:
        _fail(folder, "has a malformed place")
    data = files.mapped(name)
    if not 0 <= offset <= offset + length <= len(data):
        raise CheckpointDamaged(
            f"{folder}/{name} has {len(data)} bytes, and [{offset}:{offset + length}] is to be read"
        )
    return data[offset : offset + length]


def _by_place(found: Mapping[Any, Any], folder: str) -> dict[tuple[str, tuple[int, ...] | None], Inert]:
    places: dict[tuple[str, tuple[int, ...] | None], Inert] = {}
    for index, place in found.items():
        if not isinstance(index, Inert) or not isinstance(place, Inert) or not isinstance(index.fields.get("fqn"), str):
            _fail(folder, "has a malformed index")
        offset = index.fields.get("offset")
        places[index.fields["fqn"], None if offset is None else tuple(offset)] = place
    return places


def _box(
    files: _Files,
    stored: Mapping[tuple[str, tuple[int, ...] | None], Inert],
    fqn: str,
    shape: Sequence[int],
    chunk: Any,
) -> ForeignBox:
    folder = files.folder
    if not isinstance(chunk, Inert):
        _fail(folder, f"has a malformed chunk of {fqn!r:.80}")
    offsets, sizes = _sizes(chunk, "offsets", fqn), _sizes(chunk, "sizes", fqn)
    place = stored.get((fqn, offsets)) or (stored.get((fqn, None)) if sizes == tuple(shape) else None)
    if place is None:
        _fail(folder, f"says nothing of where {fqn!r:.80} {list(offsets)} is")
    tensor = tensor_in(_slice(files, place), f"{folder}: {fqn:.80}")
    if tuple(tensor.shape) != sizes:
        raise CheckpointDamaged(
            f"{folder}: {fqn:.80} {list(offsets)} is {list(tensor.shape)} and should be {list(sizes)}"
        )
    return ForeignBox(offsets, tensor)


def _field(inert: Inert, name: str, kind: type) -> Any:
    value = inert.fields.get(name)
    if not isinstance(value, kind):
        raise CheckpointDamaged(f"{METADATA}: {type(inert).__name__} lacks {name!r}")
    return value


def _sizes(inert: Inert, name: str, fqn: str) -> tuple[int, ...]:
    value = inert.fields.get(name)
    if not isinstance(value, tuple) or not all(type(size) is int and 0 <= size < 1 << 62 for size in value):
        raise CheckpointDamaged(f"{METADATA}: {fqn:.80} has malformed {name!r}")
    return tuple(value)
