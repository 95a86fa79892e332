"""Further checks that planted bugs have to be caught by, as those in ``mutant_checks``: of who learns how a save ended,
what forked children do, and what is taken for unchanged."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import unseen_by_crc32c
from support.forked_children import held
from support.options import by_stage

from asyncckpt import Checkpointer, PendingSave, Preemption, Run
from asyncckpt.errors import AsyncCkptError
from asyncckpt.storage.lease import LOCK_FILE
from asyncckpt.storage.posix import PosixOps

#: Children end at once, or never.
_PATIENCE_SECONDS = 5.0


def _state() -> dict[str, Any]:
    return {"w": torch.arange(50_000, dtype=torch.int32)}


class _Refusing(PosixOps):
    """Publishes nothing, and says so once ``told`` is set."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def rename_noreplace(self, source: str, target: str) -> None:
        self.told.wait(60)
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def _waited_in_vain(wait: Callable[[PendingSave], object]) -> Callable[[Path], None]:
    """Somebody waits for a save that then fails, and has given up by then: the next call says so."""

    def check(root: Path) -> None:
        run = Checkpointer(root / "run")
        run.save(1, _state()).result()
        run.wait()
        run._store.ops = ops = _Refusing()
        pending = run.save(2, _state())
        with contextlib.suppress(TimeoutError):
            wait(pending)
        ops.told.set()
        while not pending.done():
            time.sleep(0.001)
        try:
            run.wait()
        except AsyncCkptError:
            return
        finally:
            with contextlib.suppress(AsyncCkptError):
                run.close()
        raise AssertionError("a save failed, and nobody was told")

    check.__name__ = f"who waited in vain with {wait.__name__}"
    return check


def _await(pending: PendingSave) -> None:
    async def wait() -> object:
        return await pending

    asyncio.run(asyncio.wait_for(wait(), 0.05))


def _result(pending: PendingSave) -> None:
    pending.result(0.05)


who_awaited_in_vain_is_told, who_waited_in_vain_is_told = _waited_in_vain(_await), _waited_in_vain(_result)


def _code_of_child(what: Callable[[], object]) -> int | None:
    """The exit code of a forked child; None where it does not end."""
    child = multiprocessing.get_context("fork").Process(target=what)
    child.start()
    child.join(_PATIENCE_SECONDS)
    code = child.exitcode
    if code is None:
        child.kill()
        child.join()
    return code


def a_forked_child_ends_at_once(root: Path) -> None:
    """Whatever locks were held when it was forked."""
    with Checkpointer(root / "run") as run:
        pending = run.save(1, _state())
        pending.result()
        with held(run._in_flight._changed, run._committer._lock, run._arena._changed):
            assert _code_of_child(lambda: None) == 0, "the child did not end"


def a_forked_child_does_not_wait_for_a_save(root: Path) -> None:
    def waits() -> None:
        with contextlib.suppress(AsyncCkptError):
            pending.result()

    with Checkpointer(root / "run") as run:
        run.save(1, _state()).result()
        run.wait()
        run._store.ops = ops = _Refusing()
        pending = run.save(2, _state())
        code = _code_of_child(waits)
        ops.told.set()
        with contextlib.suppress(AsyncCkptError):
            pending.result()
        assert code == 0, "the child waits for a thread that it does not have"


def a_forked_child_ends_on_sigterm(root: Path) -> None:
    def child() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

    with Checkpointer(root / "run", preemption=Preemption()):
        assert _code_of_child(child) == -signal.SIGTERM, "the child went on"


def a_forked_child_has_no_lock(root: Path) -> None:
    def child() -> None:
        fds = os.listdir("/proc/self/fd")
        found = [os.readlink(f"/proc/self/fd/{fd}") for fd in fds if os.path.exists(f"/proc/self/fd/{fd}")]
        os._exit(any(path.endswith(LOCK_FILE) for path in found))

    with Checkpointer(root / "run") as run:
        run.save(1, _state()).result()
        assert _code_of_child(child) == 0, "the child keeps the directory of a killed trainer locked"


def a_change_that_crc32c_does_not_show_is_saved(root: Path) -> None:
    for number, kind in enumerate(({}, {"codec": "planes"}, {"format": "zarr"})):
        state = _state()
        with Checkpointer(root / str(number), **by_stage(digest="crc32c", **kind)) as run:
            for step in (1, 2):
                run.save(step, state).result()
                run.wait()
                expected = state["w"].clone()
                unseen_by_crc32c(state["w"])
        Run(root / str(number)).restore(found := {"w": torch.zeros_like(expected)}, 2)
        assert torch.equal(found["w"], expected), "the old values were linked"
