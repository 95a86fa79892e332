"""What fails in the background is raised once, at the next call, and an interrupt publishes nothing."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncckpt import Checkpointer, Safetensors, SaveFailed
from asyncckpt.events import Event, Failed
from asyncckpt.storage.posix import PosixOps

STATE = {"w": torch.arange(1000.0), "meta": {"a": 1}}


class Broken(PosixOps):
    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        raise OSError(5, "Input/output error")


def test_a_background_error_surfaces_at_the_next_call_and_only_once(tmp_path: Path) -> None:
    events: list[Event] = []
    with Checkpointer(tmp_path / "run", on_event=events.append) as run:
        run._store.ops = Broken()
        pending = run.save(1, STATE)
        with pytest.raises(SaveFailed, match=r"step 1.*Nothing was published"):
            while True:
                run.step(2, STATE)
                time.sleep(0.001)
        run.step(2, STATE)
        assert pending.done()
        run._store.ops = PosixOps()
        run.save(1, STATE).result()  # a failed step is free again
    assert [event.step for event in events if isinstance(event, Failed)] == [1]


def test_an_error_that_result_delivered_is_not_raised_again(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        run._store.ops = Broken()
        with pytest.raises(SaveFailed):
            run.save(1, STATE).result()
        run._store.ops = PosixOps()
        run.save(2, STATE).result()


def test_leaving_the_with_block_raises_what_failed_but_never_hides_the_bodys_error(tmp_path: Path) -> None:
    with pytest.raises(SaveFailed), Checkpointer(tmp_path / "a") as run:
        run._store.ops = Broken()
        run.save(1, STATE)
    with pytest.raises(KeyError) as caught, Checkpointer(tmp_path / "b") as run:
        run._store.ops = Broken()
        run.save(1, STATE)
        raise KeyError("mine")
    assert "background save failed too" in caught.value.__notes__[0]


def test_an_interrupt_while_copying_reaches_the_user_and_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from asyncckpt.stage import job as staging

    def interrupted(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        time.sleep(0.05)

    with Checkpointer(tmp_path / "run", files=Safetensors(extent_bytes=4096)) as run:
        monkeypatch.setattr(staging, "copy_segments", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.save(1, STATE)
        monkeypatch.undo()
        with pytest.raises(SaveFailed, match="step 1: interrupted"):
            run.wait()
        assert run.ls() == []
        run.save(1, STATE).result()
