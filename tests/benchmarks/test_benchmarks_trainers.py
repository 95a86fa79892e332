"""The suite that compares saves inside other libraries' trainers: its table, and its clock."""

from __future__ import annotations

import pytest

from benchmarks.suites.trainers import command, worker
from benchmarks.suites.trainers.worker import FRAMEWORKS, KINDS


def test_table_has_what_was_measured_from_the_third_save_on() -> None:
    raw = {"framework": "raw", "kind": "none", "copies": [0.01], "writes": [0.1]}
    stalls = {"none": [], "plain": [2.0, 2.0, 1.0, 1.0], "ours": [0.5, 0.25, 0.002, 0.004]}
    steps = {"none": [9.0, 0.1, 0.1], "plain": [9.0, 0.1, 0.1], "ours": [9.0, 0.1, 0.14]}
    events = [
        {"framework": framework, "kind": kind, "stalls": stalls[kind], "steps": steps[kind]}
        for framework in FRAMEWORKS
        for kind in KINDS
    ]
    found = command.rows([raw, *events])
    assert found[1] == ["raw write with fsync", "100 ms", "", ""]
    assert found[2] == ["transformers, its own", "1000 ms", "2000 ms and 2000 ms", "1.00 of 100 ms"]
    assert found[3] == ["transformers, asyncckpt", "3 ms", "500 ms and 250 ms", "1.20 of 100 ms"]
    assert len(found) == 2 + 2 * len(FRAMEWORKS)
    assert all(len(row) == len(command.HEAD) for row in found)


def test_step_is_what_is_left_of_its_time_without_its_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def save() -> None:
        now[0] += 5

    clock = worker.Clock()
    saving = clock.timed(save)
    for saves in (True, False, False):
        clock.step()
        now[0] += 1
        if saves:
            saving()
    assert (clock.stalls, clock.steps) == ([5.0], [1.0, 1.0])
