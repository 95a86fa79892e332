"""A line is logged where silence would cost somebody work, and not at every step."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from asyncckpt import Checkpointer, repeated_lines
from asyncckpt.ranks.lateness import LateNotice
from asyncckpt.repeated_lines import MOST_LINES, RepeatedLines, hold_back_repeated

STATE = {"w": torch.zeros(3)}


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()), persistent=False)


def test_a_module_with_nothing_to_store_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Checkpointer(tmp_path / "run") as run:
        for step in (1, 2):
            run.save(step, {"model": nn.Linear(1, 1), "metric": Mean()})
    assert caplog.text.count("component 'metric' has nothing to store; its buffers total are not persistent") == 1
    assert "'model'" not in caplog.text


@pytest.mark.parametrize(("last", "told"), [(4, False), (5, True), (1, True)])
def test_last_steps_that_are_not_saved_are_told_of(
    last: int, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(tmp_path / "run", every=2) as run:
        for step in range(1, last + 1):
            run.step(step, STATE)
    run.close()
    assert caplog.text.count(f"step {last}, the last one, is not saved") == told


def test_nothing_is_said_of_last_steps_where_the_loop_failed_or_saves_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyError), Checkpointer(tmp_path / "a", every=2) as run:
        run.step(1, STATE)
        raise KeyError
    with Checkpointer(tmp_path / "b") as run:
        run.step(1, STATE)
    with Checkpointer(tmp_path / "c", every=2) as run:
        run.step(1, STATE)
        run.save(1, STATE)
    assert "is not saved" not in caplog.text


def test_lines_that_differ_in_numbers_alone_are_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("asyncckpt.tests.repeated")
    for _ in range(2):
        hold_back_repeated(logger)
    assert [type(one) for one in logger.filters] == [RepeatedLines]
    for step in range(400):
        logger.warning("step %d: busy", step)
        logger.info("step %d", step)
    logger.warning("another")
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == [f"step {step}: busy" for step in range(MOST_LINES)] + ["another"]
    monkeypatch.setattr(repeated_lines, "WINDOW_SECONDS", 0.0)
    logger.warning("step %d: busy", 400)
    assert caplog.records[-1].getMessage() == f"step 400: busy ({400 - MOST_LINES} more such lines since)"


def test_the_librarys_own_logger_holds_repeated_lines_back() -> None:
    assert any(isinstance(one, RepeatedLines) for one in logging.getLogger("asyncckpt").filters)


def test_who_waits_for_other_ranks_says_so_within_seconds_and_ever_more_seldom(
    caplog: pytest.LogCaptureFixture,
) -> None:
    notice = LateNotice("call plan", 300.0)
    for waited in range(301):
        notice.look(float(waited), "rank 1")
    waits = [record.args[2] for record in caplog.records if isinstance(record.args, tuple)]
    assert waits == [5.0, 20.0, 80.0]
    assert "rank 1 did not call plan yet" in caplog.text
