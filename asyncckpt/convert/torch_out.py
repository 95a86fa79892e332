"""Files of ``torch.save`` out. Torch writes the file with room for the tensors' data, which is then filled in."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import types
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch

from asyncckpt.convert import torch_pickle
from asyncckpt.convert.exporting import Export
from asyncckpt.convert.placeholders import Placeholders
from asyncckpt.convert.stored import (
    ORIGIN_FILE,
    Place,
    StoredItem,
    check_overflow,
    fill_places,
    origin_json,
    view_at,
)
from asyncckpt.convert.torch_pickle import TensorStandIn
from asyncckpt.errors import UnsupportedValue
from asyncckpt.state.dtypes import CODES

_ENTRY_BYTES: Final = 46  # of an entry in the archive's list, before the name


def write_torch_file(job: Export) -> None:
    """Write a file that ``torch.load`` opens.

    Weights, or one module, are a flat ``state_dict``, which opens with ``weights_only=True``. Another component is its
    state, an optimizer's by the names of parameters; ``all`` is ``{component: state}`` with ``step`` and ``metrics``
    beside them where no component has that name."""
    made = Placeholders(job)
    content = made.content()
    path = job.output.inside("")
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(content, path)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise OSError(str(error).partition("\n")[0]) from error
    _add_origin(job, path)
    _fill(job, path, content, made.items)


def _add_origin(job: Export, path: Path) -> None:
    """Add the file that says what the archive was made of; torch reads only those that it knows."""
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(zipfile.ZipInfo(f"{folder}/{ORIGIN_FILE}"), origin_json(job.checkpoint))


def _fill(job: Export, path: Any, content: Any, items: Mapping[int, StoredItem]) -> None:
    """Put the tensors' data where torch left room for it, and the checksums of it into the archive's lists."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        body = archive.read(entries["data.pkl"])
        listed = archive.start_dir
    memory = job.output.mapped(path, os.path.getsize(path))
    written = list(_leaves(torch_pickle.unpickle_bytes(body, str(path))))
    meant = list(_leaves(content))
    if len(written) != len(meant):
        raise UnsupportedValue(f"{job.checkpoint.path}: {len(meant)} tensors became {len(written)} in the file")
    places: dict[str, tuple[StoredItem, torch.Tensor]] = {}
    for standin, placeholder in zip(written, meant, strict=True):
        item = items.get(id(placeholder))
        if item is None:
            continue  # a value that torch has written itself
        if (standin.size, CODES.get(standin.dtype)) != (item.shape, item.dtype) or standin.offset:
            raise UnsupportedValue(f"{job.checkpoint.path}: {item.name!r} became another tensor in the file")
        begin = _begin(memory, entries[f"data/{standin.storage.key}"])
        places.setdefault(standin.storage.key, (item, view_at(memory, begin, item.dtype, item.shape)))
    fill_places(job.checkpoint, [Place(item.record, target) for item, target in places.values()], job.progress)
    check_overflow(job.checkpoint, list(places.values()))
    _put_checksums(memory, [entries[f"data/{key}"] for key in places], entries, listed)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the tensors, or the stand-ins for them, in the order that they are stored in."""
    if isinstance(value, torch.Tensor | TensorStandIn):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple | deque):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, argparse.Namespace | types.SimpleNamespace):
        yield from _leaves(vars(value))


def _begin(memory: torch.Tensor, info: zipfile.ZipInfo) -> int:
    head = bytes(memory[info.header_offset : info.header_offset + 30].numpy())
    return info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")


def _put_checksums(
    memory: torch.Tensor, filled: list[zipfile.ZipInfo], entries: Mapping[str, zipfile.ZipInfo], listed: int
) -> None:
    """Write the checksums of the entries that were filled behind their data and into the archive's list, which begins
    at ``listed``: torch has written zeros."""
    data: memoryview = memory.numpy().data
    places = _listed(data, listed, len(entries))

    def one(info: zipfile.ZipInfo) -> None:
        begin = _begin(memory, info)
        end = begin + info.file_size
        with contextlib.closing(_Pieces(data, begin, end)) as pieces:
            crc = functools.reduce(lambda value, piece: zlib.crc32(piece, value), pieces, 0).to_bytes(4, "little")
        if info.flag_bits & 8 and bytes(data[end : end + 4]) == b"PK\7\x08":
            data[end + 4 : end + 8] = crc
        else:
            data[info.header_offset + 14 : info.header_offset + 18] = crc
        at = places[info.header_offset]
        data[at + 16 : at + 20] = crc

    with ThreadPoolExecutor(2, "asyncckpt-crc") as pool:
        list(pool.map(one, filled))


class _Pieces:
    """Iterates over a range of bytes in pieces of 8 MiB."""

    def __init__(self, data: memoryview, begin: int, end: int) -> None:
        self._data, self._begin, self._end = data, begin, end

    def __iter__(self) -> Iterator[memoryview]:
        step = 8 << 20
        return (self._data[at : min(at + step, self._end)] for at in range(self._begin, self._end, step))

    def close(self) -> None:
        self._data = memoryview(b"")


def _listed(data: memoryview, begin: int, count: int) -> dict[int, int]:
    """Return where the archive's list has the entry of each local header, by the offset of that."""
    found: dict[int, int] = {}
    for _ in range(count):
        head = bytes(data[begin : begin + _ENTRY_BYTES])
        if head[:4] != b"PK\1\2":
            raise OSError("torch wrote an archive whose list is not where it should be")
        name, extra, comment = (int.from_bytes(head[at : at + 2], "little") for at in (28, 30, 32))
        offset = int.from_bytes(head[42:46], "little")
        if offset == 0xFFFFFFFF:
            offset = _wide_offset(bytes(data[begin + 46 + name : begin + 46 + name + extra]), head)
        found[offset] = begin
        begin += _ENTRY_BYTES + name + extra + comment
    return found


def _wide_offset(extra: bytes, head: bytes) -> int:
    """Return the offset in the record for large files: it stands behind those of the two sizes that are there."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = int.from_bytes(extra[at : at + 2], "little"), int.from_bytes(extra[at + 2 : at + 4], "little")
        if kind == 1:
            skipped = 8 * sum(head[place : place + 4] == b"\xff\xff\xff\xff" for place in (20, 24))
            return int.from_bytes(extra[at + 4 + skipped : at + 12 + skipped], "little")
        at += 4 + size
    raise OSError("torch wrote an archive without an offset of an entry")
