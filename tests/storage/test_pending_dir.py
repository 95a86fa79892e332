"""An attempt's directory, answer by answer: what is taken over into it, and under which name it is published."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from support.answers import Answering, empty_checkpoint

from asyncckpt import CheckpointDamaged, SaveFailed
from asyncckpt.storage.local import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    made = LocalStore(str(tmp_path / "run"))
    made.prepare()
    return made


# -- files taken over --------------------------------------------------------------------------------------------------


@pytest.fixture
def old(store: LocalStore) -> Path:
    path = empty_checkpoint(store)
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


# -- publishing --------------------------------------------------------------------------------------------------------


def test_a_name_on_another_file_system_is_said_to_be(store: LocalStore) -> None:
    directory = store.begin(1, "a")
    store.ops = Answering("rename_noreplace", errno.EXDEV)
    with pytest.raises(SaveFailed, match="another file system"):
        directory.publish("step-00000001", replace=False)


def test_where_names_cannot_be_exchanged_nothing_is_replaced(store: LocalStore) -> None:
    old = empty_checkpoint(store)
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
