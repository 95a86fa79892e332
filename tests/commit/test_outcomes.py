"""Whoever waits for a save learns how it ended, and no error is lost or told twice."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from support.committing import STATE, checkpointer

from asyncckpt import Checkpointer, PendingSave, SaveFailed
from asyncckpt.storage.posix import PosixOps


class Refused(PosixOps):
    """Lets a save come to its publication, waits for the gate there, and fails it."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def rename_noreplace(self, source: str, target: str) -> None:
        assert self.gate.wait(30)
        raise OSError(errno.EIO, "refused")


def outcome(pending: PendingSave) -> None:
    """Wait until it is done, as nobody who is given the outcome."""
    while not pending.done():
        pending._wait(0.1)


async def awaited(pending: PendingSave) -> object:
    return await pending


async def _timed_out(pending: PendingSave) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(awaited(pending), 0.05)


async def _cancelled(pending: PendingSave) -> None:
    task = asyncio.ensure_future(awaited(pending))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _dropped(pending: PendingSave) -> None:
    coroutine = awaited(pending)
    coroutine.send(None)
    coroutine.close()


def _with_a_limit(pending: PendingSave) -> None:
    for wait in (pending.result, pending.exception):
        with pytest.raises(TimeoutError):
            wait(0.05)


WAITS: list[Callable[[PendingSave], Any]] = [_timed_out, _cancelled, _dropped, _with_a_limit]


@pytest.mark.parametrize("waits", WAITS, ids=lambda waits: waits.__name__)
def test_whoever_waited_in_vain_has_not_seen_the_error(waits: Callable[[PendingSave], Any], tmp_path: Path) -> None:
    run = checkpointer(tmp_path, ops := Refused())
    pending = run.save(2, STATE)
    waiting = waits(pending)
    if waiting is not None:
        asyncio.run(waiting)
    ops.gate.set()
    outcome(pending)
    with pytest.raises(SaveFailed, match="step 2"):
        run.wait()
    run.close()


def test_an_error_that_comes_at_the_very_end_of_a_wait_is_not_lost(tmp_path: Path) -> None:
    """The wait is over, the error is not there yet; it comes while ``TimeoutError`` is being raised."""
    run = checkpointer(tmp_path, ops := Refused())
    pending = run.save(2, STATE)

    class Late(Future):  # type: ignore[type-arg]
        def result(self, timeout: float | None = None) -> Any:
            try:
                return super().result(timeout)
            finally:
                ops.gate.set()
                while not self.done():
                    time.sleep(0.001)

        exception = result

    pending._future.__class__ = Late
    with pytest.raises(TimeoutError):
        pending.result(0.05)
    ops.gate.set()
    outcome(pending)
    with pytest.raises(SaveFailed, match="step 2"):
        run.wait()
    run.close()


def test_an_error_that_was_awaited_is_not_raised_again(tmp_path: Path) -> None:
    run = checkpointer(tmp_path, ops := Refused())
    ops.gate.set()
    with pytest.raises(SaveFailed, match="step 2"):
        asyncio.run(awaited(run.save(2, STATE)))
    assert run.wait()
    run.close()


def everybody_is_told(run: Checkpointer) -> None:
    assert run._in_flight.wait_below(1, 10)
    assert run._in_flight.wait_told(10)
    assert run.events.notifier.drain(10)


def test_a_callback_that_ends_its_thread_keeps_no_outcome_from_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = checkpointer(tmp_path, ops := Refused())
    pending = run.save(2, STATE)
    heard: list[PendingSave] = []

    def leaves(_: PendingSave) -> None:
        raise SystemExit(1)

    async def all_of_it() -> None:
        pending.add_done_callback(leaves)
        pending.add_done_callback(heard.append)
        task = asyncio.ensure_future(awaited(pending))
        await asyncio.sleep(0.05)
        ops.gate.set()
        with pytest.raises(SaveFailed, match="step 2"):
            await asyncio.wait_for(task, 30)

    asyncio.run(all_of_it())
    everybody_is_told(run)
    assert heard == [pending]
    assert "step 2: a callback raised" in caplog.text
    with pytest.raises(SystemExit):  # on the thread of whoever adds it, at once: its own affair
        pending.add_done_callback(leaves)
    again = run.save(3, STATE)
    again.add_done_callback(leaves)
    outcome(again)
    everybody_is_told(run)
    with pytest.raises(SaveFailed, match="step 3"):
        run.wait()
    run.close()


def test_an_error_that_an_interrupted_close_did_not_come_to_is_raised_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = checkpointer(tmp_path, ops := Refused())
    ops.gate.set()
    outcome(run.save(2, STATE))

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(run._committer, "wait_below", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.close()
    with pytest.raises(SaveFailed, match="step 2"):
        run.close()
    run.close()
