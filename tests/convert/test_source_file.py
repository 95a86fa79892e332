"""A file of a source gives its bytes whatever the page cache and the file system do, and is read once by those who go
through it side by side."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from asyncckpt import CheckpointDamaged
from asyncckpt.convert import source_file
from asyncckpt.convert.formats import import_checkpoint
from asyncckpt.convert.source import Source
from asyncckpt.convert.source_file import BLOCK_BYTES, SourceFile

_NBYTES = 3 * BLOCK_BYTES + 12345


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(_NBYTES))
    return path


def _opened(path: Path) -> SourceFile:
    fd = os.open(path, os.O_RDONLY)
    return SourceFile(fd, os.fstat(fd), threading.Condition())


def _forget(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _without(monkeypatch: pytest.MonkeyPatch, feature: str) -> None:
    """Have the kernel or the file system lack something."""
    preadv, opened = os.preadv, os.open

    def reading(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags and feature == "cache":
            raise OSError(errno.EOPNOTSUPP, "not here")
        if feature == "transfer" and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not here")
        return preadv(fd, buffers, offset, flags)

    def opening(name: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT and feature == "open":
            raise OSError(errno.EINVAL, "not here")
        return opened(name, flags, *rest, **more)

    monkeypatch.setattr(source_file.os, "preadv", reading)
    monkeypatch.setattr(source_file.os, "open", opening)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("lacking", ["", "cache", "open", "transfer"])
def test_any_range_is_what_the_file_has(
    path: Path, cached: bool, lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = path.read_bytes()
    if not cached:
        _forget(path)
    _without(monkeypatch, lacking)
    file = _opened(path)
    choose, sizes = random.Random(2), (1, 100, 5000, BLOCK_BYTES, 2 * BLOCK_BYTES)
    ranges = [(choose.randrange(_NBYTES), choose.choice(sizes)) for _ in range(60)]

    def read(wanted: tuple[int, int]) -> bool:
        offset, nbytes = wanted
        target = bytearray(nbytes)
        got = file.read_into(offset, memoryview(target))
        return got == min(nbytes, _NBYTES - offset) and target[:got] == data[offset : offset + nbytes]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, ranges))
    file.close()
    file.close()


def test_a_file_is_read_once_for_whoever_takes_its_tensors_and_whoever_digests_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {f"w{number}": torch.randn(1 << 20) for number in range(16)}
    torch.save(weights, tmp_path / "in.pt")
    _forget(tmp_path / "in.pt")
    read: list[int] = []
    honest = SourceFile._read

    def counted(self: SourceFile, number: int, block: Any) -> None:
        read.append(number)
        honest(self, number, block)

    monkeypatch.setattr(SourceFile, "_read", counted)
    done = import_checkpoint(tmp_path / "in.pt", tmp_path / "run", 1)
    blocks = -(-(tmp_path / "in.pt").stat().st_size // BLOCK_BYTES)
    assert sorted(set(read)) == list(range(blocks))
    assert len(read) <= blocks + 2, "blocks were read twice"
    files: Any = done.source["files"]
    assert files["in.pt"]["xxh3-128"] == xxhash.xxh3_128((tmp_path / "in.pt").read_bytes()).hexdigest()


def test_what_is_not_taken_is_digested_too(path: Path) -> None:
    with Source("torch", str(path)) as source:
        source.open_file(str(path)).expected = True
        source.nothing_more_is_read()
        found = source.digests("xxh3-128", lambda _what, _done, _total: None)
    assert found == {"file": {"nbytes": _NBYTES, "xxh3-128": xxhash.xxh3_128(path.read_bytes()).hexdigest()}}


def test_a_file_that_ends_too_early_or_cannot_be_read_is_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Source("torch", str(path)) as source:
        source.open_file(str(path))
        os.truncate(path, _NBYTES - 100)
        with pytest.raises(CheckpointDamaged, match=r"became shorter while it was read"):
            source.digests("sha256", lambda _what, _done, _total: None)

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with Source("torch", str(path)) as source:
        source.open_file(str(path))
        monkeypatch.setattr(source_file.os, "preadv", broken)
        with pytest.raises(CheckpointDamaged, match=r"cannot be read \(Input/output error\)"):
            source.digests("sha256", lambda _what, _done, _total: None)
