"""A disk without space, or a path that cannot be written to, is said to be that, with what to do."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncckpt import Checkpointer, KeepLast, NotEnoughSpace, RunLocked, RunOptions, RunPathError
from asyncckpt.storage.local import LocalStore
from asyncckpt.testing import InterceptedOps

STATE = {"w": torch.arange(50_000, dtype=torch.float32), "plain": {"a": 1}}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "t", mount], check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_a_full_disk_is_foreseen_and_older_checkpoints_stay(small_disk: Path) -> None:
    state = {"w": torch.zeros(130_000)}  # 0.5 MB; small files are estimated at 4 MiB, more than this disk has
    run = Checkpointer(small_disk / "run")
    with pytest.raises(NotEnoughSpace, match=r"step 1: .* bytes free and the save needs .*free space"):
        run.save(1, state).result()
    assert not [name for name in os.listdir(small_disk / "run") if name.startswith(("step", ".tmp"))]
    run.close()


def test_a_disk_that_fills_up_during_the_save_removes_the_attempt(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Checkpointer(small_disk / "run")
    monkeypatch.setattr(run._store, "free_bytes", lambda: 1 << 40)  # the estimate was wrong
    run.save(1, {"w": torch.zeros(130_000)}).result()
    with pytest.raises(NotEnoughSpace, match="step 2"):
        run.save(2, {"w": torch.zeros(900_000)}).result()
    assert [name for name in sorted(os.listdir(small_disk / "run")) if name.startswith(("step", ".tmp"))] == [
        "step-00000001"
    ]
    assert run.verify(1) == []
    run.save(3, {"w": torch.zeros(130_000)}).result()
    run.close()


def test_too_little_space_runs_retention_before_giving_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Checkpointer(tmp_path / "run")
    for step in (1, 2, 3):
        run.save(step, STATE).result()
    run.wait()
    run._committer._pruner.policies = (KeepLast(1),)
    space = lambda: 1 << 30 if len(run.ls()) < 3 else 0  # noqa: E731
    monkeypatch.setattr(run._store, "free_bytes", space)
    run.save(4, STATE).result()
    run.wait()
    assert [entry.step for entry in run.ls()] == [4]
    run.close()


def test_paths_that_cannot_be_used_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunPathError, match=r"is a file.*another path"):
        Checkpointer(tmp_path / "file").save(1, STATE)
    with pytest.raises(RunPathError, match=r"does not exist.*create_parents=True"):
        Checkpointer(tmp_path / "no" / "such" / "run").save(1, STATE)
    with pytest.raises(RunPathError, match=r"part of the path is a file|does not exist"):
        Checkpointer(tmp_path / "file" / "run").save(1, STATE)
    with Checkpointer(tmp_path / "no" / "such" / "run", run=RunOptions(create_parents=True)) as run:
        run.save(1, STATE).result()


def test_a_probe_that_another_run_tidies_up_is_no_unusable_path(tmp_path: Path) -> None:
    """Of two runs that began at one time, the second was told to repair its path: it has to hear of the first."""

    class Tidied(InterceptedOps):
        def after(self, name: str, args: tuple[Any, ...]) -> None:
            if name == "mkdir" and "probe" in args[0]:
                LocalStore(str(tmp_path / "run")).reclaim()

    with Checkpointer(tmp_path / "run") as first:
        first.prepare(STATE)
        second = Checkpointer(tmp_path / "run")
        second._store.ops = Tidied()
        with pytest.raises(RunLocked):
            second.prepare(STATE)


def test_a_read_only_file_system_says_so(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(RunPathError, match="read-only"):
        Checkpointer(small_disk / "run").save(1, STATE)


def test_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with Checkpointer(tmp_path / "run") as run:
            path = Path(run.save(1, STATE).result().path)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
