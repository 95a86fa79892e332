"""The local store, answer by answer: what a file system may say, and what becomes of it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncckpt import CheckpointDamaged, RunPathError, SaveFailed
from asyncckpt.storage import local, shard_file
from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.posix import PosixOps
from asyncckpt.testing import InterceptedOps

PAGE = 4096


class Answering(InterceptedOps):
    """Answers an operation with an errno where ``when`` holds for its arguments; ``late``: after it was done."""

    def __init__(self, operation: str, code: int, when: Callable[..., bool] = lambda *_: True, *, late: bool = False):
        self.operation, self.code, self.when, self.late = operation, code, when, late
        self.answered = 0

    def _answer(self, name: str, args: tuple[Any, ...]) -> None:
        if name == self.operation and self.when(*args):
            self.answered += 1
            raise OSError(self.code, os.strerror(self.code), str(args[0]))

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self.late:
            self._answer(name, args)
        return args

    def after(self, name: str, args: tuple[Any, ...]) -> None:
        if self.late:
            self._answer(name, args)


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


# ---------------------------------------------------------------------------------------- the run directory


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_parent_that_is_not_ours_to_sync_is_no_hindrance(code: int, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    ops = Answering("fsync_directory", code, lambda path: path == str(tmp_path))
    LocalStore(str(tmp_path / "run"), ops=ops).prepare()
    assert ops.answered


@pytest.mark.parametrize("there", [False, True])
def test_a_parent_that_fails_to_sync_is(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "run").mkdir()
    ops = Answering("fsync_directory", errno.EIO, lambda path: path == str(tmp_path))
    with pytest.raises(RunPathError, match="cannot write here"):
        LocalStore(str(tmp_path / "run"), ops=ops).prepare()


def test_a_directory_that_is_not_there_has_no_checkpoints_and_a_file_is_none(tmp_path: Path) -> None:
    assert LocalStore(str(tmp_path / "none")).names() == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RunPathError, match="is a file"):
        LocalStore(str(tmp_path / "file")).names()


def test_an_attempts_directory_is_never_reused_but_by_the_ranks_of_that_attempt(store: LocalStore) -> None:
    first = store.begin(1, "abc", shared=True)
    assert store.begin(1, "abc", shared=True).path == first.path
    with pytest.raises(FileExistsError):
        store.begin(1, "abc")


def test_an_attempt_whose_answer_was_lost_leaves_no_directory(store: LocalStore) -> None:
    store.ops = Answering("mkdir", errno.EIO, late=True)
    with pytest.raises(OSError, match="Input/output"):
        store.begin(1, "abc")
    assert os.listdir(store.path) == []


# ------------------------------------------------------------------------------------------------- deletion


def _checkpoint(store: LocalStore, name: str = "step-00000001") -> Path:
    path = Path(store.path, name)
    path.mkdir()
    (path / "manifest.json").write_text("{}")
    return path


def test_without_locks_a_checkpoint_can_still_be_deleted(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_fd: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    path = _checkpoint(store)
    monkeypatch.setattr(local.fcntl, "flock", none)
    assert store.remove(path.name)
    assert os.listdir(store.path) == []


def test_a_checkpoint_that_is_read_is_not_deleted_and_one_without_a_manifest_is(store: LocalStore) -> None:
    path = _checkpoint(store)
    with (path / "manifest.json").open() as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        assert not store.remove(path.name)
    (path / "manifest.json").unlink()
    assert store.remove(path.name)


def test_what_cannot_be_read_or_renamed_is_left_for_the_next_run(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    directory = store.begin(1, "ab" * 16)
    store.ops = Answering("scan", errno.EIO)
    with pytest.raises(RunPathError, match="cannot be read or synced"):
        store.reclaim()
    store.ops = Answering("rename_noreplace", errno.EIO)
    store.reclaim()
    assert os.path.isdir(directory.path)
    assert "the next run tries again" in caplog.text
    store.ops = Answering("rename_noreplace", errno.ENOENT)  # another rank was faster
    store.reclaim()
    store.ops = InterceptedOps()
    Path(store.path, f".tmp-latest-{'1' * 32}").write_text("")
    Path(store.path, f".tmp-probe-{'2' * 32}").symlink_to("elsewhere")  # nothing of ours
    store.reclaim()
    assert os.listdir(store.path) == [f".tmp-probe-{'2' * 32}"]


@pytest.mark.parametrize(
    "name",
    [
        ".tmp-mydata",
        ".tmp-notes.txt",
        ".trash-can",
        ".tmp-00000001-x",
        ".tmp-1-" + "a" * 32,  # ours have eight digits at least
        ".tmp-00000001-" + "a" * 31,
        ".tmp-00000001-" + "A" * 32,
        ".tmp-00000001-" + "a" * 32 + ".bak",
        ".tmp-lease-",
        ".trash-step-00000001",
        ".trash-step-00000001-" + "a" * 31,
        ".replaced-step-00000001-" + "a" * 32,  # ours, but not to be deleted unseen
        ".replaced-mine",
        ".damaged-step-00000001-01234567",
        "tmp-00000001-" + "a" * 32,
    ],
)
def test_a_name_that_is_not_a_leftover_of_ours_is_never_deleted(store: LocalStore, name: str) -> None:
    folder = Path(store.path, name)
    folder.mkdir(parents=True)
    (folder / "precious").write_text("a year of work")
    assert store.reclaim() == []
    assert (folder / "precious").read_text() == "a year of work"


@pytest.mark.parametrize("kind", ["00000007", "123456789", "probe", "latest", "lease", "doctor"])
def test_leftovers_of_ours_are_deleted(store: LocalStore, kind: str) -> None:
    names = [f".tmp-{kind}-{'0123456789abcdef' * 2}", f".trash-step-{kind}-{'0123456789abcdef' * 2}"]
    for name in names:
        Path(store.path, name, "deep").mkdir(parents=True)
    assert sorted(store.reclaim()) == sorted(names)
    assert os.listdir(store.path) == []


def test_a_tree_that_vanishes_while_it_is_deleted_is_deleted(store: LocalStore) -> None:
    directory = store.begin(1, "abc")
    Path(directory.path, "folder").mkdir()
    Path(directory.path, "folder", "file").write_text("")
    store.ops = Answering("unlink", errno.ENOENT, late=True)
    store.delete_tree(directory.path)
    assert os.listdir(store.path) == []
    store.delete_tree(directory.path)


def test_a_hint_written_in_small_pieces_is_whole(store: LocalStore) -> None:
    class Short(InterceptedOps):
        def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0], bytes(args[1])[:1], args[2]) if name == "pwrite" else args

    store.ops = Short()
    store.put("latest", b"step-1\n", replace=True)
    assert Path(store.path, "latest").read_text() == "step-1\n"


# ------------------------------------------------------------------------------------------- files taken over


@pytest.fixture
def old(store: LocalStore) -> Path:
    path = _checkpoint(store)
    (path / "m.safetensors").write_bytes(b"12345678")
    return path


def _link(store: LocalStore, old: Path, attempt: str, nbytes: int = 8) -> bool:
    reader = store.open(old.name)
    try:
        return store.begin(2, attempt).link(reader, "m.safetensors", nbytes, "m.safetensors")
    finally:
        reader.close()


def test_a_file_of_another_size_is_not_taken_over(store: LocalStore, old: Path) -> None:
    with pytest.raises(CheckpointDamaged, match="another size than the 9 bytes"):
        _link(store, old, "a", nbytes=9)


@pytest.mark.parametrize("operation", ["reflink", "link"])
def test_an_error_that_does_not_mean_unsupported_fails_the_save(operation: str, store: LocalStore, old: Path) -> None:
    store.reflinks = operation == "reflink"
    store.ops = Answering(operation, errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        _link(store, old, "a")


def test_without_reflinks_there_are_links_and_without_those_everything_is_written(store: LocalStore, old: Path) -> None:
    store.ops = Answering("reflink", errno.EOPNOTSUPP)
    assert _link(store, old, "a")
    assert not store.reflinks
    assert (old / "m.safetensors").stat().st_nlink == 2
    store.ops = Answering("link", errno.EMLINK)  # of this file, not of this file system
    assert not _link(store, old, "b")
    assert store.links
    store.ops = Answering("link", errno.EPERM)
    assert not _link(store, old, "c")
    assert not store.links
    assert not _link(store, old, "d")
    assert store.ops.answered == 1, "it was tried again"


@pytest.mark.parametrize("code", [errno.EMLINK, errno.EIO])
def test_small_files_of_equal_content_are_written_where_they_cannot_be_linked(code: int, store: LocalStore) -> None:
    directory = store.begin(1, "a")
    store.ops = Answering("link", code)
    files = {"one/zarr.json": b"{}", "two/zarr.json": b"{}"}
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            directory.write_small(files)
    else:
        directory.write_small(files)
        assert [Path(directory.path, name).read_bytes() for name in files] == [b"{}", b"{}"]


# ------------------------------------------------------------------------------------------------ publishing


def test_a_name_on_another_file_system_is_said_to_be(store: LocalStore) -> None:
    directory = store.begin(1, "a")
    store.ops = Answering("rename_noreplace", errno.EXDEV)
    with pytest.raises(SaveFailed, match="another file system"):
        directory.publish("step-00000001", replace=False)


def test_where_names_cannot_be_exchanged_nothing_is_replaced(store: LocalStore) -> None:
    old = _checkpoint(store)
    directory = store.begin(1, "a")
    store.ops = Answering("exchange", errno.EINVAL)
    with pytest.raises(SaveFailed, match=r"cannot exchange two names.*Save another step"):
        directory.publish(old.name, replace=True)
    assert (old / "manifest.json").exists()


def test_an_attempt_whose_withdrawal_may_not_last_is_left_alone(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Which of its two names the disk has, nobody knows: neither may be deleted."""
    directory = store.begin(1, "a")
    store.ops = Answering("fsync_directory", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        directory.publish("step-00000001", replace=False)
    directory.discard()
    assert os.path.isdir(directory.path)
    assert "is left for the next run to delete" in caplog.text


# -------------------------------------------------------------------------------------------------- writing


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


# ------------------------------------------------------------------------------ a file that several ranks write


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


# ----------------------------------------------------------------------------------------------------------- NFS


def test_retention_spares_what_is_read_where_a_lock_takes_a_descriptor_for_writing(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS v4 answers EBADF to others. That was taken for a file system without locks, and the checkpoint deleted."""
    honest = fcntl.flock

    def as_on_nfs(fd: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        honest(fd, operation)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    checkpoint = Path(store.path, "step-00000001")
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    reader = store.open(checkpoint.name)
    assert not store.remove(checkpoint.name)
    assert checkpoint.is_dir()
    reader.close()
    assert store.remove(checkpoint.name)


def test_a_manifest_that_may_only_be_read_is_locked_all_the_same(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Path(store.path, "step-00000001")
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    honest = os.open

    def no_writing(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if str(path).endswith("manifest.json") and flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return honest(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", no_writing)
    reader = store.open(checkpoint.name)
    assert not store.remove(checkpoint.name)
    reader.close()
    assert store.remove(checkpoint.name)


class _Remembering(PosixOps):
    """As NFS: what was looked at once is not looked at again before the directory is opened."""

    def __init__(self) -> None:
        self.known: dict[str, os.stat_result] = {}

    def lstat(self, path: str, folder: int | None = None) -> os.stat_result:
        if path not in self.known:
            self.known[path] = super().lstat(path, folder)
        return self.known[path]

    def open_to_read(self, path: str, flags: int, folder: int | None = None) -> int:
        self.known.clear()
        return super().open_to_read(path, flags, folder)


def test_what_another_machine_deleted_is_gone_though_nfs_remembers_it(tmp_path: Path) -> None:
    """A reader called a checkpoint damaged that another machine's retention had deleted while it looked."""
    store = LocalStore(str(tmp_path), ops=_Remembering())
    (tmp_path / "step-00000001").mkdir()
    assert store.identity("step-00000001") is not None
    (tmp_path / "step-00000001").rmdir()
    assert store.identity("step-00000001") is None
