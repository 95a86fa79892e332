"""The run directory, answer by answer: what a file system may say of checkpoints that are listed, read or deleted."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from pathlib import Path
from typing import Any

import pytest
from support.answers import Answering, empty_checkpoint

from asyncckpt import RunPathError
from asyncckpt.storage import local
from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.posix import PosixOps
from asyncckpt.testing import InterceptedOps


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    made = LocalStore(str(tmp_path / "run"))
    made.prepare()
    return made


# -- the run directory -------------------------------------------------------------------------------------------------


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


# -- deletion ----------------------------------------------------------------------------------------------------------


def test_without_locks_a_checkpoint_can_still_be_deleted(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_fd: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    path = empty_checkpoint(store)
    monkeypatch.setattr(local.fcntl, "flock", none)
    assert store.remove(path.name)
    assert os.listdir(store.path) == []


def test_a_checkpoint_that_is_read_is_not_deleted_and_one_without_a_manifest_is(store: LocalStore) -> None:
    path = empty_checkpoint(store)
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
        ".damaged-step~00000001-01234567",
        ".replaced-step~00000001-" + "a" * 32,
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
    names.append(f".trash-step~{kind}-{'0123456789abcdef' * 2}")
    for name in names:
        Path(store.path, name, "deep").mkdir(parents=True)
    assert sorted(store.reclaim()) == sorted(names)
    assert os.listdir(store.path) == []


class _Renames(InterceptedOps):
    """Keeps the names that directories got."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[str] = []

    def rename_noreplace(self, source: str, target: str) -> None:
        self.given.append(os.path.basename(target))
        super().rename_noreplace(source, target)


@pytest.mark.parametrize("name", ["step-2", "weights-step-00000002", "run-step-2+2"])
def test_no_hidden_name_has_a_step_in_it_for_those_who_look_anywhere(store: LocalStore, name: str) -> None:
    ops = store.ops = _Renames()
    for hide in (
        store.remove,
        store.set_aside,
        lambda name: store.make_way(name, "a" * 32),
        lambda name: store.throw_away(os.path.join(store.path, name), name),
    ):
        Path(store.path, name).mkdir(parents=True)
        hide(name)
    [replaced] = store.replaced()
    assert (replaced.name, replaced.attempt) == (name, "a" * 32)
    store.remove(replaced.hidden)
    store.begin(2, "b" * 32)
    store.reclaim()
    assert len(ops.given) == 6
    for hidden in ops.given:
        assert hidden.startswith(".")
        assert not re.search(r"step-(\d+)", hidden), hidden


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


# -- NFS ---------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["pwrite", "fsync", "rename_noreplace"])
def test_a_small_file_that_could_not_be_written_is_not_there_at_all(name: str, store: LocalStore) -> None:
    store.prepare()
    store.put(".pins/first", b"")
    ops = store.ops
    store.ops = Answering(name, errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        store.put(".pins/step-1", b"why it is pinned")
    store.ops = ops
    assert list(store.listing(".pins")) == ["first"]
    store.put(".pins/step-1", b"why it is pinned")
    assert store.listing(".pins")["step-1"].nbytes == 16
    with pytest.raises(FileExistsError):
        store.put(".pins/step-1", b"")
