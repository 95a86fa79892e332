"""A file system that goes away in the middle of a save, and memory that is not given: errors, and nothing lost."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import multiprocessing
import os
import resource
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.scenarios import SCENARIOS, check_visible, generation_in, state_of

from asyncckpt import AsyncCkptError, Checkpointer, NotEnoughMemory, Run
from asyncckpt.memory import arena
from asyncckpt.testing import READING, InterceptedOps, blockdevice
from asyncckpt.testing.blockdevice import loop_device, mounted

#: ``FS_IOC_SHUTDOWN`` of ext4 and XFS; without flushing the log: as if the disk had gone.
_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2
#: The parameter of glibc's ``mallopt`` that bounds the number of its arenas.
_M_ARENA_MAX = -8


class _GoingAway(InterceptedOps):
    """The file system is shut down before an operation."""

    def __init__(self, root: Path, number: int) -> None:
        self.fd = os.open(root, os.O_RDONLY)
        self.number = number
        self.seen = 0

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if name not in READING:
            self.seen += 1
            if self.seen == self.number:
                fcntl.ioctl(self.fd, _SHUTDOWN, _NO_LOG_FLUSH.to_bytes(4, "little"))
                os.close(self.fd)
        return args


def test_a_file_system_that_goes_away_in_a_save_loses_nothing(tmp_path: Path) -> None:
    reason = blockdevice.reason_unavailable("mkfs.ext4")
    if reason is not None:
        pytest.skip(reason)
    image, root = tmp_path / "image", tmp_path / "disk"
    root.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "has_journal", image], check=True)
    newest = 0
    with loop_device(image) as device:
        for number in range(1, 60, 3):
            with mounted(device, root, "ext4"):
                visible = check_visible(root / "run") if (root / "run").exists() else {}
                assert max(visible.values(), default=0) >= newest, "what was acknowledged is gone"
                run = SCENARIOS["safetensors"].checkpointer(root / "run")
                newest = max(visible.values(), default=0) + 1
                run.save(newest, state_of(newest)).result()
                run.wait()
                ops = run._store.ops = _GoingAway(root, number)
                error = run.save(newest + 1, state_of(newest + 1)).exception(30)
                hit = ops.seen >= number
                assert (error is not None) == hit or hit, error
                assert error is None or isinstance(error, AsyncCkptError), f"untyped: {error!r}"
                if error is None:
                    newest += 1
                if not hit:
                    os.close(ops.fd)
                _left(run)
                del run
                gc.collect()
            if not hit:
                break
        with mounted(device, root, "ext4"):
            assert generation_in(Run(root / "run", direct=False), None) >= newest


def _left(run: Checkpointer) -> None:
    """Close it on a file system that is gone: it may say so, and may not hang."""
    with contextlib.suppress(AsyncCkptError, OSError):
        run.close()


def _save_with_little_memory(root: Path) -> None:
    signal.alarm(60)  # it ends, whatever happens
    # an arena of malloc's for each thread reserves 64 MiB of addresses: how many there are is not to decide
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    threading.stack_size(1 << 20)  # as many threads as the machine has cores for are not to decide either
    run = SCENARIOS["safetensors"].checkpointer(root, keep=(), staging_bytes=None)
    run.save(1, state_of(1)).result()
    large = {**state_of(2), "large": torch.zeros(40 << 20)}
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # without room for even a thread's stack, Python's own Thread.start waits for ever
    resource.setrlimit(resource.RLIMIT_AS, (used + large["large"].nbytes // 2, before[1]))
    run.save(2, large).result(60)
    assert run._arena.budget_bytes < large["large"].nbytes, "the limit was never felt"
    resource.setrlimit(resource.RLIMIT_AS, before)
    run.close()


def test_a_state_for_which_there_is_little_memory_is_staged_in_parts(tmp_path: Path) -> None:
    # a process of its own: in a fork of this one, what other tests left and is freed only then would be room
    child = multiprocessing.get_context("spawn").Process(target=_save_with_little_memory, args=(tmp_path / "run",))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert Run(tmp_path / "run").verify(2) == []


def test_no_memory_for_even_one_extent_is_an_error_of_that_save_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Checkpointer(tmp_path / "run")

    def refuse(_nbytes: int, **_: object) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(arena, "Region", refuse)
        with pytest.raises(NotEnoughMemory, match="budget_bytes"):
            run.save(1, state_of(1))
    run.save(1, state_of(1)).result()
    run.close()
    assert check_visible(tmp_path / "run") == {1: 1}
