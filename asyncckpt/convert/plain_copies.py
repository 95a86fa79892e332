"""Bytes that are the same on both sides are written from the buffer that they were verified in, past the page cache
where they lie alike in their blocks."""

from __future__ import annotations

import bisect
import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from asyncckpt.manifest.records import ExtentRecord, FileRecord, TensorRecord
from asyncckpt.read.damage import raise_damage
from asyncckpt.read.extents import Read, extents_of
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.storage.posix import NO_DIRECT
from asyncckpt.types import ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class PlainCopy:
    """All bytes of a stored tensor go to the file ``path`` from ``offset`` on."""

    record: TensorRecord
    path: Path
    offset: int


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes ``[begin, end)`` of a stored file lie ``shift`` bytes further on in the file ``path``."""

    begin: int
    end: int
    shift: int
    path: Path


def copy_plainly(checkpoint: OpenCheckpoint, copies: Sequence[PlainCopy], read: Read) -> None:
    """Read the tensors, verify them, and write them where they go; the files are there and large enough. Blocks. Raises
    ``CheckpointDamaged`` and ``OSError``."""
    if not copies:
        return
    runs = _runs(copies)
    starts = {file: [run.begin for run in found] for file, found in runs.items()}
    chosen = extents_of(checkpoint.manifest, {file: [(r.begin, r.end) for r in found] for file, found in runs.items()})
    with _opened({copy.path for copy in copies}) as files:

        def consume(file: FileRecord, extent: ExtentRecord, view: memoryview) -> None:
            found = runs[file.name]
            at = max(0, bisect.bisect_right(starts[file.name], extent.offset) - 1)
            while at < len(found) and found[at].begin < extent.offset + len(view):
                low, high = max(found[at].begin, extent.offset), min(found[at].end, extent.offset + len(view))
                if low < high:
                    data = view[low - extent.offset : high - extent.offset]
                    files[found[at].path].write(data, low + found[at].shift, found[at].shift % ALIGNMENT_BYTES == 0)
                at += 1

        raise_damage(checkpoint.reader.path, read(checkpoint.reader, checkpoint.manifest, chosen, consume))


def _runs(copies: Sequence[PlainCopy]) -> dict[str, list[_Run]]:
    """Return what is to be copied of each stored file, in order; neighbours that stay neighbours are one run."""
    runs: dict[str, list[_Run]] = defaultdict(list)
    for copy in sorted(copies, key=lambda one: (one.record.file, one.record.begin, one.offset)):
        record = copy.record
        if record.begin == record.end:
            continue
        mine = runs[record.file]
        shift = copy.offset - record.begin
        last = mine[-1] if mine else None
        if last is not None and (last.end, last.shift, last.path) == (record.begin, shift, copy.path):
            mine[-1] = _Run(last.begin, record.end, shift, copy.path)
        else:
            mine.append(_Run(record.begin, record.end, shift, copy.path))
    return runs


class _File:
    """A file that is written by several threads: whole blocks past the page cache where that is possible."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._direct = -1
        try:
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in NO_DIRECT:
                os.close(self._fd)
                raise

    def write(self, data: memoryview, offset: int, aligned: bool) -> None:
        """Write the bytes at ``offset``. ``aligned``: they lie in memory as in their blocks of the file."""
        first = -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        last = (offset + len(data)) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        if not aligned or self._direct < 0 or first >= last:
            _write(self._fd, data, offset)
            return
        try:
            _write(self._direct, data[first - offset : last - offset], first)
        except OSError as error:  # some file systems take the flag, and then refuse the write
            if error.errno not in NO_DIRECT:
                raise
            _write(self._fd, data[first - offset : last - offset], first)
        _write(self._fd, data[: first - offset], offset)
        _write(self._fd, data[last - offset :], last)

    def close(self) -> None:
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)


def _write(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


@contextlib.contextmanager
def _opened(paths: set[Path]) -> Iterator[dict[Path, _File]]:
    files: dict[Path, _File] = {}
    try:
        for path in paths:
            files[path] = _File(path)
        yield files
    finally:
        for file in files.values():
            file.close()
