"""The suite that measures how light saves are: its counting sees who holds the interpreter, and its bars judge."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suites.light import bars
from benchmarks.suites.light.command import QUICK_JOBS
from benchmarks.suites.light.counting import Counter, FullCollections
from benchmarks.suites.light.state import adamw_state
from benchmarks.suites.light.worker import SCENARIOS


def test_a_call_that_keeps_the_interpreter_is_seen_whole() -> None:
    holds = ctypes.PyDLL(None)  # a call of it keeps the interpreter
    with Counter() as counter:
        time.sleep(0.2)
        counter.stretch()
        holds.usleep(200_000)
        held = counter.stretch()
    assert held.longest_seconds >= 0.15
    assert 0.15 <= held.lost_seconds <= held.seconds


def test_time_without_a_core_is_not_lost() -> None:
    """Others may take the cores: what the thread waits for them is no time without the interpreter."""
    busy = [multiprocessing.get_context("spawn").Process(target=_spin) for _ in range(2 * (os.cpu_count() or 1))]
    for process in busy:
        process.start()
    try:
        with Counter() as counter:
            time.sleep(1.0)
            counted = counter.stretch()
    finally:
        for process in busy:
            process.kill()
            process.join()
    assert counted.lost_seconds < 0.3 * counted.seconds


def _spin() -> None:
    while True:
        pass


def test_only_full_collections_count() -> None:
    with FullCollections() as collections:
        gc.collect(0)
        gc.collect(1)
        assert collections.count == 0
        gc.collect()
    gc.collect()
    assert collections.count == 1


def test_a_state_has_about_as_many_tensors_as_asked_for() -> None:
    state = adamw_state(160, 8)
    parameters = list(state["model"].parameters())
    assert len(parameters) == 40
    assert sum(len(entry) for entry in state["optimizer"].state.values()) == 120


@pytest.mark.parametrize(("seconds", "met"), [(0.009, True), (0.011, False)])
def test_a_bar_is_met_or_not_by_the_median(seconds: float, met: bool) -> None:
    event = {"scenario": "returns", "tensors": 24_000, "step_seconds": 0.2, "quiet_step_seconds": 0.1}
    event |= {"return_seconds": seconds, "durable_seconds": 1.0}
    (row,) = bars.rows([event])
    assert row.met is met
    assert "24,000" in row.figure


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_each_scenario_of_the_suite_reports_figures_that_its_bars_take(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    for number, job in enumerate(QUICK_JOBS):
        if job.scenario in (
            "loops",
            "first_step",
            "interpreter",
        ):  # these take their seconds however small the state is
            continue
        state = adamw_state(job.tensors, 64)
        found = list(SCENARIOS[job.scenario](str(_made(tmp_path / f"{number}-{job.scenario}")), state, 1))
        assert found
        events += [{**event, "scenario": job.scenario, "tensors": 24_000} for event in found]
    measured = bars.rows(events)
    assert {row.figure.split(",")[0] for row in measured} >= {"deferred save() returning", "restore", "stall"}
