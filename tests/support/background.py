"""Looks at background processes from outside, and runs trainers that are killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch

#: What is waited for takes milliseconds, or never comes; a machine may be busy.
PATIENCE_SECONDS = 30.0


def until(reached: Callable[[], object]) -> None:
    """Wait until something is true; fail where it does not come to that."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.005)


def background_pids(trainer: int | None = None) -> list[int]:
    """Return the background processes that this process, or another, has started and that still run."""
    wanted = str(os.getpid() if trainer is None else trainer)
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has ended meanwhile
                continue
            if "asyncckpt.background" in words and words[-2:] == [wanted, ""]:
                found.append(int(folder.name))
    return found


def only_pid(trainer: int | None = None) -> int:
    """Return the one background process, once it runs."""
    until(lambda: len(background_pids(trainer)) == 1)
    return background_pids(trainer)[0]


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP has reached all threads of a process."""
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return all(state == "T" for state in states)


def stop(pid: int) -> None:
    """Stop a process, and wait until it stands still."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: is_stopped(pid))


class ForkedTrainer:
    """Runs ``body`` in a forked process, which tells the test what it has come to by ``say``, a line each. A context
    manager: what still runs at its end is killed."""

    def __init__(self, body: Callable[[Callable[[str], None]], Any]) -> None:
        read_end, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:  # the child must never return into pytest
            status = 3
            try:
                os.close(read_end)
                os.setsid()
                torch.set_num_threads(1)  # the parent's OpenMP threads do not exist in a fork
                body(lambda line: (os.write(write_end, f"{line}\n".encode()), None)[1])
                status = 0
            except BaseException as error:
                print(repr(error), file=sys.__stderr__, flush=True)
            finally:
                os._exit(status)
        os.close(write_end)
        self._lines = os.fdopen(read_end)
        self.status: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.status is None:
            self.end(signal.SIGKILL)
        for left in background_pids(self.pid) if kind is not None else ():  # a test that failed may have it stopped
            os.kill(left, signal.SIGKILL)
        self._lines.close()

    def hear(self) -> str:
        """Return the next line that it says; empty where it has ended. Blocks."""
        return self._lines.readline().rstrip("\n")

    def end(self, number: int | None = None) -> int:
        """Send a signal, if any, and wait for its end. Returns its exit code, negative for a signal."""
        if number is not None:
            os.kill(self.pid, number)
        _, status = os.waitpid(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        return self.status
