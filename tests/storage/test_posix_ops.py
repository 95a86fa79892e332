"""The calls to the system, where the system is another one."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncckpt import Checkpointer
from asyncckpt.storage import posix
from asyncckpt.storage.posix import PosixOps


def _not_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posix.sys, "platform", "darwin")


def _old_libc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posix, "_libc", object())


@pytest.mark.parametrize("system", [_not_linux, _old_libc])
def test_without_renameat2_a_name_is_still_never_taken_from_another(
    system: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patched:
        system(patched)
        with pytest.raises(FileExistsError):
            PosixOps().rename_noreplace(str(tmp_path / "one"), str(tmp_path / "two"))
        PosixOps().rename_noreplace(str(tmp_path / "one"), str(tmp_path / "three"))
        with pytest.raises(OSError, match="not implemented") as refused:
            PosixOps().exchange(str(tmp_path / "two"), str(tmp_path / "three"))
    assert refused.value.errno == errno.ENOSYS
    assert sorted(os.listdir(tmp_path)) == ["three", "two"]


def test_where_blocks_can_be_shared_unchanged_files_share_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on XFS and btrfs: a file of its own, fsynced, made without its bytes being read."""
    cloned: list[int] = []

    def clone(target: int, request: int, source: int) -> int:
        assert request == posix._FICLONE
        os.copy_file_range(source, target, os.fstat(source).st_size)
        cloned.append(os.fstat(target).st_ino)
        return 0

    state = {"w": torch.arange(1000)}
    monkeypatch.setattr(posix.fcntl, "ioctl", clone)
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, state).result()
        report = run.save(2, state).result()
        shards = [next((tmp_path / "run" / name).glob("w-*")) for name in ("step-00000001", "step-00000002")]
        assert shards[1].stat().st_ino in cloned
        assert shards[0].stat().st_ino != shards[1].stat().st_ino
        assert report.written_bytes < state["w"].nbytes
        assert run.verify(2) == []


def test_an_entry_that_vanishes_while_a_directory_is_listed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stays").touch()
    (tmp_path / "goes").touch()

    class Entries:
        def __init__(self, path: str) -> None:
            self.entries = list(scandir(path))

        def __enter__(self) -> list[os.DirEntry[str]]:
            os.unlink(tmp_path / "goes")
            return self.entries

        def __exit__(self, *_: object) -> None:
            pass

    scandir = os.scandir
    monkeypatch.setattr(posix.os, "scandir", Entries)
    assert list(PosixOps().scan(str(tmp_path))) == ["stays"]
