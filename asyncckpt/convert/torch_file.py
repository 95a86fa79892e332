"""Files of ``torch.save`` in: ``.pt``, ``.pth``, Lightning's ``.ckpt``, ``pytorch_model.bin``, zipped or of the old
kind.

Nothing in them is executed (``torch_pickle``), and tensors are read from where they lie.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from asyncckpt.convert import torch_pickle
from asyncckpt.convert.source import Source, SourceComponent, module
from asyncckpt.convert.tensors import FileTensor, SourceTensor, ViewTensor
from asyncckpt.convert.torch_archive import TorchArchive, end_of
from asyncckpt.convert.torch_pickle import TensorStandIn
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.state.dtypes import CODES

#: A pickle beside the tensors of a file is smaller than this.
_MAX_PICKLE_BYTES: Final = 512 << 20
_MAGIC: Final = 0x1950A86A20F9469CFC6C
#: A component's name has none of these, and is none of those.
_ODD: Final = re.compile(r"[^A-Za-z0-9_=+-]+")
_RESERVED: Final = ("state", "manifest", "latest")


def read_torch_file(path: str) -> Source:
    """Open a file of ``torch.save``. Raises ``CheckpointNotFound`` and ``CheckpointDamaged``."""
    source = Source("torch", path)
    try:
        content = content_of(source, path)
        source.components = _components(content, source)
    except BaseException:
        source.close()
        raise
    return source


def content_of(source: Source, path: str) -> Any:
    """Return what the file holds, its tensors as ``SourceTensor`` objects: equal ones where they are tied. ``source``
    holds the file open, and learns what is lost."""
    fd = source.open_file(path).fd
    value, place = _zipped(source, path) if os.pread(fd, 4, 0) == b"PK\3\4" else _legacy(source, path)
    made: dict[TensorStandIn, SourceTensor] = {}

    def tensor(standin: TensorStandIn) -> SourceTensor | str:
        if standin.dtype not in CODES:
            return f"a tensor of {standin.dtype}, for which safetensors has no name"
        if standin not in made:
            made[standin] = _tensor(source, path, standin, place)
        return made[standin]

    return torch_pickle.resolve(value, tensor, source.lost, path)


#: Returns the offset and the size of a storage in the file, by its key.
_Place = Callable[[str], tuple[int, int]]


def _tensor(source: Source, path: str, tensor: TensorStandIn, place: _Place) -> SourceTensor:
    code, item = CODES[tensor.dtype], tensor.dtype.itemsize
    begin, nbytes = place(tensor.storage.key)
    if 0 in tensor.size:
        return ViewTensor(torch.empty(tensor.size, dtype=tensor.dtype))
    end = end_of(tensor.offset, tensor.size, tensor.stride)
    if end * item > nbytes:
        raise CheckpointDamaged(f"{path}: a tensor reaches beyond its storage {tensor.storage.key!r:.40}")
    file = source.open_file(path)
    expected = 1
    plain = True
    for count, step in zip(reversed(tensor.size), reversed(tensor.stride), strict=True):
        plain = plain and (count == 1 or step == expected)
        expected *= count
    if plain:
        return FileTensor(code, tensor.size, file, begin + tensor.offset * item, path)
    data = source.map_file(path)[begin : begin + end * item]
    bytes_ = torch.frombuffer(data, dtype=torch.uint8)
    if begin % item:  # the old kind of file does not align its storages
        bytes_ = bytes_.clone()
    return ViewTensor(bytes_.view(tensor.dtype).as_strided(tensor.size, tensor.stride, tensor.offset))


# -- zipped files ------------------------------------------------------------------------------------------------------
def _zipped(source: Source, path: str) -> tuple[Any, _Place]:
    opened = source.open_file(path)
    fd, size = opened.fd, opened.nbytes
    with os.fdopen(os.dup(fd), "rb") as file:
        archive = TorchArchive(file, lambda at, count: os.pread(fd, count, at), size, path, _MAX_PICKLE_BYTES)
    sums = _Sums(archive, path)
    if sums.unproven:
        source.notes.append(f"{sums.unproven} parts of the file have no checksum: damage in them could not be seen")
    source.watch(path, sums.see)
    return torch_pickle.unpickle_bytes(archive.pickle, path), archive.storage


class _Sums:
    """Compares the entries of an archive with their checksums while its bytes go by. An entry whose checksum is 0 has
    none, since torch can be told so; ``unproven``: how many those are."""

    def __init__(self, archive: TorchArchive, path: str) -> None:
        self._path = path
        entries = [(*archive.place(name), info) for name, info in archive.entries.items()]
        self.unproven = sum(bool(nbytes and not info.CRC) for _, nbytes, info in entries)
        proven = [(begin, begin + nbytes, info) for begin, nbytes, info in entries if info.CRC]
        self._waiting = deque(sorted(proven, key=lambda entry: entry[0]))
        self._open: list[tuple[int, int, zipfile.ZipInfo, int]] = []

    def see(self, offset: int, piece: memoryview) -> None:
        """Take the next bytes of the file. Raises ``CheckpointDamaged``."""
        end = offset + len(piece)
        while self._waiting and self._waiting[0][0] < end:
            self._open.append((*self._waiting.popleft(), 0))
        still = []
        for first, last, info, value in self._open:
            value = zlib.crc32(piece[max(0, first - offset) : max(0, last - offset)], value)
            if last > end:
                still.append((first, last, info, value))
            elif value != info.CRC:
                raise CheckpointDamaged(
                    f"{self._path}: {info.filename!r:.80} does not match its checksum; copy the file again"
                )
        self._open = still


# -- the old kind ------------------------------------------------------------------------------------------------------
def _legacy(source: Source, path: str) -> tuple[Any, _Place]:
    """Read a file that ``torch.save`` wrote before version 1.6, or with ``_use_new_zipfile_serialization=False``: five
    pickles, and then each storage behind the number of its elements."""
    opened = source.open_file(path)
    fd, size = opened.fd, opened.nbytes
    with os.fdopen(os.dup(fd), "rb") as raw:
        raw.seek(0)
        file = io.BufferedReader(raw) if not isinstance(raw, io.BufferedReader) else raw
        numbers = _Reading(file, size)
        try:
            magic = torch_pickle.unpickle(numbers, path)
        except CheckpointDamaged as error:
            raise CheckpointDamaged(f"{path}: no file of torch.save") from error
        if magic != _MAGIC:
            raise CheckpointDamaged(f"{path}: no file of torch.save")
        torch_pickle.unpickle(numbers, path)
        system = torch_pickle.unpickle(numbers, path)
        if isinstance(system, Mapping) and system.get("little_endian") is False:
            raise CheckpointDamaged(f"{path}: written on a machine of another byte order")
        value = torch_pickle.unpickle(numbers, path)
        keys = torch_pickle.unpickle(numbers, path)
        at = file.tell()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointDamaged(f"{path}: no list of storages in it")
    dtypes: dict[str, torch.dtype] = {}
    _find_storages(value, dtypes)
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        count = int.from_bytes(os.pread(fd, 8, at), "little")
        if key not in dtypes:
            raise CheckpointDamaged(f"{path}: a storage {key!r:.40} of a type that is not known")
        nbytes = count * dtypes[key].itemsize
        if at + 8 + nbytes > size:
            raise CheckpointDamaged(f"{path}: storage {key!r:.40} is cut off")
        places[key] = at + 8, nbytes
        at += 8 + nbytes
    source.notes.append("a file of the old kind has no checksums: damage in it could not be seen")

    def place(key: str) -> tuple[int, int]:
        if key not in places:
            raise CheckpointDamaged(f"{path}: storage {key!r:.40} is missing")
        return places[key]

    return value, place


class _Reading:
    """Presents a file to an unpickler that must not read ahead: other pickles follow."""

    def __init__(self, file: io.BufferedReader, size: int) -> None:
        self._file = file
        self._size = size
        self.readline = file.readline

    def read(self, nbytes: int) -> bytes:
        """Read so many bytes, or what is left: memory is never taken for a length that is only claimed."""
        return self._file.read(min(nbytes, self._size) if nbytes > 4096 else nbytes)


def _find_storages(value: Any, found: dict[str, torch.dtype]) -> None:
    stack, seen = [value], set()
    while stack:
        node = stack.pop()
        if isinstance(node, TensorStandIn):
            found[node.storage.key] = node.storage.dtype
        elif isinstance(node, Mapping) and id(node) not in seen:
            seen.add(id(node))
            stack += node.values()
        elif isinstance(node, list | tuple | set | frozenset) and id(node) not in seen:
            seen.add(id(node))
            stack += node


# -- what the content becomes ------------------------------------------------------------------------------------------
def _components(content: Any, source: Source) -> list[SourceComponent]:
    """Return the components that the content of a file becomes, and say in the source's notes which."""
    if _is_state_dict(content):
        source.notes.append(f"a state_dict of {len(content)} tensors became the module 'model'")
        return [module("model", content)]
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        source.notes.append(f"a {type(content).__name__} became the tree 'value'")
        return [SourceComponent("value", "plain", content)]
    loose = {key: item for key, item in content.items() if isinstance(item, SourceTensor)}
    if any(_is_state_dict(item) for item in content.values()):  # these are no weights of the model, then
        loose = {}
    found: list[SourceComponent] = []
    if loose:
        found.append(module("model", loose))
        source.notes.append(f"{len(loose)} tensors beside other values became the module 'model'")
    taken = {one.name for one in found} | set(content)
    rest = {key: item for key, item in content.items() if key not in loose}
    if isinstance(rest.get("step"), int) and _are_metrics(rest.get("metrics")):
        source.metrics = dict(rest.pop("metrics"))
        source.notes.append(f"step {rest.pop('step')} and metrics of an export of this library are in the manifest")
    for key, item in rest.items():
        name = "model" if key == "state_dict" and "model" not in taken else _ODD.sub("_", key).lstrip("+-=") or "value"
        name += "_" if name.casefold() in _RESERVED else ""
        if name.casefold() in {one.name.casefold() for one in found}:
            raise CheckpointDamaged(
                f"{source.path}: {key!r:.80} would be the component {name!r}, as another key; choose with --exclude"
            )
        component, what = _component(name, item)
        found.append(component)
        source.notes.append(f"{key!r:.80} became the {what} {name!r}")
    return found


def _component(name: str, item: Any) -> tuple[SourceComponent, str]:
    if isinstance(item, SourceTensor):
        return SourceComponent(name, "tensor", item), "tensor"
    if _is_state_dict(item):
        return module(name, item), f"module of {len(item)} tensors"
    if isinstance(item, Mapping) and isinstance(item.get("state"), Mapping) and "param_groups" in item:
        named = _named(item)
        if named is not None:
            return SourceComponent(name, "optimizer", named), "optimizer"
        return SourceComponent(name, "plain", item), "tree (an optimizer whose parameters have no names)"
    return SourceComponent(name, "plain", item), "tree"


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(item, SourceTensor) for key, item in value.items())
    )


def _are_metrics(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and type(number) in (int, float) for key, number in value.items()
    )


def _named(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return an optimizer's state by the names of its parameters; None where it has none, or is of no usual form."""
    groups = state["param_groups"]
    if not isinstance(groups, list) or not all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups
    ):
        return None
    members = [one for group in groups for one in group["params"]]
    if members and all(isinstance(one, str) for one in members):
        return dict(state)
    names: dict[Any, str] = {}
    for group in groups:
        given = group.get("param_names")
        if not isinstance(given, list) or len(given) != len(group["params"]):
            return None
        names.update(zip(group["params"], given, strict=True))
    if not all(isinstance(name, str) for name in names.values()) or len(set(names.values())) != len(members):
        return None
    by_name = {names.get(key, key): value for key, value in state["state"].items()}
    renamed = [{**group, "params": [names[one] for one in group["params"]]} for group in groups]
    return {**state, "state": by_name, "param_groups": renamed}
