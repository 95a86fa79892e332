"""Callbacks and subscribers may block and may call anything: nothing in a save waits for them, only ``close`` does."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
import torch

from asyncckpt import Checkpointer, CheckpointerClosed, DurabilityUnknown, PendingSave, SaveAbandoned, WriterOptions
from asyncckpt.commit import committer
from asyncckpt.events import Committed, Event
from asyncckpt.scope import SaveScope
from asyncckpt.storage.posix import PosixOps
from asyncckpt.testing import GatedOps

STATE = {"w": torch.arange(1000.0)}


def test_a_callback_that_blocks_holds_no_later_save_up(tmp_path: Path) -> None:
    go_on = threading.Event()
    with Checkpointer(tmp_path / "run", on_event=lambda _: go_on.wait(30)) as run:
        pending = run.save(1, STATE)
        pending.add_done_callback(lambda _: go_on.wait(30))
        for step in (2, 3, 4):
            run.save(step, STATE).result(20)
        assert run.wait(20)
        go_on.set()


def test_a_callback_may_wait_save_and_close(tmp_path: Path) -> None:
    run = Checkpointer(tmp_path / "run")
    called = threading.Event()
    trouble: list[BaseException] = []

    def everything(_: PendingSave) -> None:
        try:
            assert run.unfinished() == 0, "told before the save was off the list"
            assert run.wait(20)
            run.save(2, STATE).result(20)
            run.close()
        except BaseException as error:
            trouble.append(error)
        called.set()

    run.save(1, STATE).add_done_callback(everything)
    assert called.wait(60)
    assert trouble == []
    assert [entry.step for entry in run.ls()] == [1, 2]
    with pytest.raises(CheckpointerClosed):
        run.save(3, STATE)


def test_close_waits_for_callbacks_and_subscribers_and_not_in_one_of_them(tmp_path: Path) -> None:
    told: list[str] = []

    def subscriber(event: Event) -> None:
        if isinstance(event, Committed):
            time.sleep(0.1)
            told.append("event")
            run.close()

    run = Checkpointer(tmp_path / "run", on_event=subscriber)
    run.save(1, STATE).add_done_callback(lambda _: told.append("callback"))
    run.close()
    assert told == ["event", "callback"]


def test_a_callback_that_never_returns_holds_close_up_until_its_deadline(tmp_path: Path) -> None:
    stuck = threading.Event()
    run = Checkpointer(tmp_path / "run", writer=WriterOptions(durable_timeout_seconds=0.5))
    run.save(1, STATE).add_done_callback(lambda _: stuck.wait(30))
    run.close()
    stuck.set()
    Checkpointer(tmp_path / "run").close()


def test_close_waits_for_a_save_that_another_thread_begins(tmp_path: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Slow:
        def state_dict(self) -> dict[str, int]:
            entered.set()
            assert go_on.wait(30)
            return {"a": 1}

        def load_state_dict(self, _: dict[str, int]) -> None: ...

    run = Checkpointer(tmp_path / "run")
    closing = threading.Thread(target=run.close)
    saving = threading.Thread(target=run.save, args=(1, {"slow": Slow()}))
    saving.start()
    assert entered.wait(30)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    go_on.set()
    saving.join(30)
    closing.join(30)
    assert [entry.step for entry in run.ls()] == [1]


class HungName(PosixOps):
    """Hangs while a checkpoint gets its name."""

    def __init__(self) -> None:
        self.gate, self.hung = threading.Event(), threading.Event()

    def rename_noreplace(self, source: str, target: str) -> None:
        self.hung.set()
        assert self.gate.wait(60)
        super().rename_noreplace(source, target)


def test_what_hangs_while_it_becomes_visible_is_not_said_to_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows yet: ``SaveAbandoned`` would promise that nothing of it comes later."""
    monkeypatch.setattr(committer, "_GRACE_SECONDS", 0.2)
    with Checkpointer(tmp_path / "run", writer=WriterOptions(durable_timeout_seconds=0.3)) as run:
        run.prepare(STATE)
        ops = run._store.ops = HungName()
        with pytest.raises(DurabilityUnknown, match="step 1"):
            asyncio.run(_awaited(run.save(1, STATE)))
        ops.gate.set()
        assert run.wait(20)
        run._store.ops = PosixOps()
        run.save(2, STATE).result(20)
        assert [entry.step for entry in run.ls()] == [1, 2]


async def _awaited(pending: PendingSave) -> None:
    await asyncio.wait_for(_result(pending), 30)


async def _result(pending: PendingSave) -> object:
    return await pending


def test_a_save_is_given_up_or_published_never_both() -> None:
    given_up, error = SaveScope(1), SaveAbandoned("late")
    assert given_up.give_up(error)
    with pytest.raises(SaveAbandoned):
        given_up.begin_publish()
    published = SaveScope(2)
    published.begin_publish()
    assert not published.give_up(error)
    assert published.error is None


def test_what_close_gave_up_is_not_published_when_the_storage_is_back(tmp_path: Path) -> None:
    run = Checkpointer(tmp_path / "run")
    run.prepare(STATE)
    ops = run._store.ops = GatedOps()
    pending = run.save(1, STATE)
    run._end(0.0)
    assert isinstance(pending.failure(), SaveAbandoned)
    ops.gate.set()
    time.sleep(0.2)
    assert run.ls() == []


def test_close_waits_for_a_callback_that_the_committer_has_not_posted_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce = PendingSave.announce

    def late(pending: PendingSave) -> None:
        time.sleep(0.3)
        announce(pending)

    monkeypatch.setattr(PendingSave, "announce", late)
    heard: list[str] = []
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, STATE).add_done_callback(lambda _: heard.append(threading.current_thread().name))
    assert heard == ["asyncckpt-notifier"]
