"""A shard's file, answer by answer: whole bytes or an error, whoever else writes the same file."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from support.answers import Answering

from asyncckpt import SaveFailed
from asyncckpt.storage import shard_file
from asyncckpt.storage.local import LocalStore
from asyncckpt.testing import InterceptedOps

PAGE = 4096


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    made = LocalStore(str(tmp_path / "run"))
    made.prepare()
    return made


def pages(count: int, fill: bytes = b"x") -> memoryview:
    """Memory that a direct write takes."""
    memory = mmap.mmap(-1, count * PAGE)
    memory[:] = (fill * PAGE)[:PAGE] * count
    return memoryview(memory)


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_shard_that_was_given_up_takes_no_more(store: LocalStore) -> None:
    writer = store.begin(1, "a").create_shard("m", 1 << 20)
    writer.abort()
    writer.abort()
    with pytest.raises(SaveFailed, match="given up"):
        writer.write_at(pages(1), PAGE, 0)


def test_a_write_that_is_in_the_kernel_when_its_shard_is_given_up_ends_there(store: LocalStore) -> None:
    """Its descriptor stays until then: closed, it could be another file's by the next piece."""
    entered, go_on = threading.Event(), threading.Event()

    class Slow(InterceptedOps):
        def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if name == "pwrite":
                entered.set()
                assert go_on.wait(10)
                return args[0], memoryview(args[1])[:PAGE], args[2]
            return args

    store.ops = Slow()
    writer = store.begin(1, "a").create_shard("m", 1 << 20)
    errors: list[BaseException] = []

    def write() -> None:
        try:
            writer.write_at(pages(2), 2 * PAGE, 0)
        except SaveFailed as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    assert entered.wait(10)
    descriptor = writer._fd
    writer.abort()
    os.fstat(descriptor)
    go_on.set()
    thread.join(10)
    assert "given up" in str(errors[0])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_write_without_progress_is_an_error_and_no_endless_loop(store: LocalStore) -> None:
    class Stuck(InterceptedOps):
        def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0], b"", args[2]) if name == "pwrite" else args

    store.ops = Stuck()
    writer = store.begin(1, "a").create_shard("m", 1 << 20)
    with pytest.raises(SaveFailed, match="made no progress"):
        writer.write_at(pages(1), PAGE, 0)
    writer.abort()


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_system_without_direct_writes_is_written_through_the_cache(shared: bool, store: LocalStore) -> None:
    def makes_the_name_and_refuses(path: str, flags: int) -> bool:
        if flags & os.O_DIRECT:
            Path(path).touch()
        return bool(flags & os.O_DIRECT)

    store.ops = Answering("open", errno.EINVAL, makes_the_name_and_refuses)
    writer = store.begin(1, "a", shared=shared).create_shard("m", 100 * PAGE, shared=shared)
    assert not store.direct
    writer.write_at(pages(100), 100 * PAGE, 0)
    writer.finish(100 * PAGE)
    assert Path(store.path, ".tmp-00000001-a", "m").read_bytes() == b"x" * 100 * PAGE


def test_an_open_that_fails_fails_the_save(store: LocalStore) -> None:
    store.ops = Answering("open", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        store.begin(1, "a").create_shard("m", 1 << 20)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EOPNOTSUPP])
def test_space_is_reserved_where_that_can_be_done(code: int, store: LocalStore) -> None:
    directory = store.begin(1, "a")
    store.ops = Answering("reserve", code)
    if code == errno.ENOSPC:
        with pytest.raises(OSError, match="No space"):
            directory.create_shard("m", 1 << 20)
    else:
        writer = directory.create_shard("m", 1 << 20)
        writer.write_at(pages(1), PAGE, 0)
        writer.finish(PAGE)


def test_a_descriptor_that_will_not_close_does_not_hide_why_a_save_failed(store: LocalStore) -> None:
    directory = store.begin(1, "a")
    writer = directory.create_shard("m", 1 << 20)
    store.ops = writer._ops = Answering("close", errno.EIO, late=True)
    directory.discard()
    assert not os.path.exists(directory.path)
    assert store.ops.answered


# -- a file that several ranks write -----------------------------------------------------------------------------------


def test_ranks_that_share_blocks_of_a_file_do_not_spoil_each_others_bytes(store: LocalStore) -> None:
    directory = store.begin(1, "a", shared=True)
    one, two = (directory.create_shard("m", 3 * PAGE << 8, shared=True) for _ in range(2))
    middle = PAGE + 100
    one.write_at(pages(2, b"1"), middle, 0)
    two.write_at(pages(2, b"2"), 2 * PAGE - 100, middle)
    one.write_at(pages(1, b"3"), 10, 3 * PAGE)
    two.finish(3 * PAGE + 10)
    one.finish(3 * PAGE + 10)
    data = Path(directory.path, "m").read_bytes()
    assert data[: 3 * PAGE + 10] == b"1" * middle + b"2" * (2 * PAGE - 100) + b"3" * 10


def test_shared_edges_are_written_before_they_fill_the_memory(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_file, "_MAX_EDGES_BYTES", 150)
    directory = store.begin(1, "a", shared=True)
    writer = directory.create_shard("m", 1 << 20, shared=True)
    writer.write_at(pages(1), 100, 0)
    assert Path(directory.path, "m").read_bytes()[:100] == bytes(100)
    writer.write_at(pages(1), 100, 100)
    assert Path(directory.path, "m").read_bytes()[:200] == b"x" * 200
    writer.abort()


def test_shared_files_go_through_the_cache_where_transfers_are_refused(store: LocalStore) -> None:
    def direct(fd: int, *_: object) -> bool:
        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)

    store.ops = Answering("pwrite", errno.EINVAL, direct)
    directory = store.begin(1, "a", shared=True)
    writer = directory.create_shard("m", 1 << 20, shared=True)
    writer.write_at(pages(2), 2 * PAGE, 0)
    writer.finish(2 * PAGE)
    assert Path(directory.path, "m").read_bytes()[: 2 * PAGE] == b"x" * 2 * PAGE
    assert store.ops.answered == 1


def test_two_transfers_refused_at_one_time_both_go_through_the_cache(store: LocalStore) -> None:
    both = threading.Barrier(2)

    def direct(fd: int, *_: object) -> bool:
        refused = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        if refused:
            both.wait(10)
        return refused

    store.ops = Answering("pwrite", errno.EINVAL, direct)
    writer = store.begin(1, "a").create_shard("m", 1 << 20)
    threads = [threading.Thread(target=writer.write_at, args=(pages(1), PAGE, n * PAGE)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    writer.finish(2 * PAGE)
    assert Path(store.path, ".tmp-00000001-a", "m").read_bytes() == b"x" * 2 * PAGE
