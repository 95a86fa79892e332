"""Runs trainings in forked children, some of which are killed at one of the system calls that saves make."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

from asyncckpt.storage.posix import PosixOps

#: What saves call that changes the disk.
_CALLS = ("mkdir", "pwrite", "fsync", "fsync_directory", "rename_noreplace", "replace", "link", "unlink", "rmdir")


def in_child(body: Callable[[], Any], kill_at: int | None = None) -> tuple[bool, int]:
    """Run ``body`` in a forked child, which kills itself with SIGKILL before the call ``kill_at`` to the disk, if it
    comes so far. Return whether it was killed, and how many calls it has made. What it raises fails the test."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            made = count_calls(kill_at)
            body()
            os.write(write, made[0].to_bytes(8, "little"))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, "the training failed; see its traceback"
    return killed, int.from_bytes(data, "little")


def count_calls(kill_at: int | None) -> list[int]:
    """Count this process's calls to the disk in the list that is returned, and kill it before the call ``kill_at``."""
    made = [0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            made[0] += 1
            if made[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counting

    for name in _CALLS:
        setattr(PosixOps, name, counted(getattr(PosixOps, name)))
    return made
