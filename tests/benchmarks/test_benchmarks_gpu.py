"""The suite that measures saves beside training on a GPU: how it counts, what it shows, and that it says so where there
is none. No figure here is of a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.snapshot_device import DEVICE, StandIn

from asyncckpt import starter
from asyncckpt.stage import device_snapshot
from benchmarks import cli
from benchmarks.harness.state import ModelSize
from benchmarks.suites.gpu import bars, command, worker
from benchmarks.suites.gpu import state as states
from benchmarks.suites.gpu.contenders import CONTENDERS, NOTHING
from benchmarks.suites.gpu.state import calibrated, gpt_state, many_state
from benchmarks.suites.gpu.windows import Window, measure

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


class Clock:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        patch.setattr("time.perf_counter", lambda: self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds


def test_drag_is_what_a_window_takes_beyond_quiet_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    slow = iter([0.5, 0.2])

    def save() -> Any:
        clock.passes(0.01)
        saved_at = clock.now
        state["slow"] = True
        return lambda: clock.now - saved_at > 0.75

    state = {"slow": False}

    def iterate() -> None:
        clock.passes(next(slow, 0.1) if state["slow"] else 0.1)

    window = measure(iterate, save, least=3, quiet=4)
    assert len(window.iterations) == 3
    assert window.baseline_seconds == pytest.approx(0.1)
    assert window.stall_seconds == pytest.approx(0.01)
    assert window.drag_seconds() == pytest.approx(0.01 + 0.4 + 0.1)
    assert window.drag_seconds(1) == pytest.approx(0.01 + 0.4)
    assert window.worst_seconds() == pytest.approx(0.51)
    assert window.commit_seconds() == pytest.approx(0.1)
    assert window.durable_seconds == pytest.approx(0.81)


def test_a_window_without_a_save_is_counted_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    window = measure(lambda: clock.passes(0.1), None, least=5)
    assert len(window.iterations) == 5
    assert window.stall_seconds == 0.0
    assert window.drag_seconds() == pytest.approx(0.0)


def _event(contender: str, **figures: Any) -> dict[str, Any]:
    return {"scenario": "loop", "contender": contender, "kind": "window", **figures}


def _window(contender: str, drag: float, stall: float = 0.004) -> dict[str, Any]:
    window = Window(stall, (0.1 + drag - stall, 0.1), 0.1, 5.0)
    return _event(contender, **{k: v for k, v in worker._window(window).items() if k != "kind"})


@pytest.mark.parametrize(("drag", "met"), [(0.012, True), (0.016, False)])
def test_the_bar_of_drag_is_above_the_same_window_without_a_save(drag: float, met: bool) -> None:
    (row, *_) = bars.bars([_window(NOTHING, 0.008, 0.0), _window("device", drag)])
    assert row.met is met
    assert row.figure == "drag of a whole save, device"


def test_a_contender_that_fails_is_listed_with_its_error() -> None:
    events = [_event("device", kind="state", nbytes=10**9, tensors=4, batch=2), _window("device", 0.01)]
    described: dict[str, str | int] = {"date": "d", "cpu": "c", "cores": 1, "memory_bytes": 1 << 30, "kernel": "k"}
    described |= {"filesystem": "f", "python": "p", "torch": "t"}
    failed = {"DCP async_save, thread, pinned": "Traceback\nKeyError: 'type'"}
    result = command.result_of(events, failed, described, 1)
    first, _ = result.tables
    assert [row[0] for row in first.rows] == ["device", "DCP async_save, thread, pinned"]
    assert first.rows[1][1] == "KeyError: 'type'"
    assert first.rows[0][1].startswith("4.0 ")
    assert all(len(row) == len(first.head) for row in first.rows)


def test_contenders_are_chosen_by_name() -> None:
    assert command.jobs(["eager", "device"]) == [
        ("ceilings", NOTHING),
        ("loop", NOTHING),
        ("loop", "device"),
        ("loop", "eager"),
        ("many", "device"),
    ]
    assert len(command.jobs([])) == 2 + len(CONTENDERS) + 2
    with pytest.raises(Exception, match="unknown contenders"):
        command.jobs(["deviec"])


@NO_GPU
def test_without_a_gpu_nothing_is_measured_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["gpu", "--directory", str(tmp_path), "--out", str(tmp_path / "out"), "--record"])
    assert exit.value.code == 2
    assert " ".join(capsys.readouterr().err.split()) == command.NO_GPU
    assert list(tmp_path.iterdir()) == []


@NO_GPU
@pytest.mark.parametrize("contender", ["device", "eager", "deferred, zarr", "DCP async_save, thread", NOTHING])
def test_each_kind_of_contender_can_be_measured(
    contender: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_NOTHING_ITERATIONS", 2)
    if contender == "device":
        monkeypatch.setattr(starter, "cuda_devices", lambda tensors: {DEVICE} if tensors else set())
        stand_in = StandIn()
        monkeypatch.setattr(device_snapshot.DeviceSnapshots.__init__, "__defaults__", (lambda _: stand_in,))
    tiny = ModelSize(layers=1, width=32, heads=2, vocabulary=64, context=32)
    monkeypatch.setitem(states._SIZES, "tiny", tiny)
    state = gpt_state("tiny", "cpu")
    events = list(worker.loop(state, str(tmp_path), "cpu", contender, 1, 1))
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "state"
    assert "window" in kinds
    if contender != NOTHING:
        assert {"memory", "reserved", "interpreter"} <= set(kinds)
    assert ("drain" in kinds) == (contender == "device")
    described = [{**event, "scenario": "loop", "contender": contender} for event in events]
    (row,) = bars.table(described, {})
    assert row[0] == contender


def test_the_other_scenarios_report_what_the_bars_take(tmp_path: Path) -> None:
    state = many_state("cpu", 20)
    found = [{**event, "scenario": "many", "contender": "device"} for event in _many(state, tmp_path)]
    ceilings = list(worker.ceilings(state, str(tmp_path), "cpu", NOTHING, 1))
    assert [event["kind"] for event in ceilings] == ["bus", "disk"]
    (row,) = bars.bars(found)
    assert row.figure == "... 24,000 tensors"


def _many(state: Any, path: Path) -> list[dict[str, Any]]:
    return list(worker.many(state, str(path), "cpu", "eager", 2))


def test_the_batch_is_the_one_whose_iterations_take_as_long_as_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    tried: list[int] = []

    def trainer(_state: Any, _device: str, batch: int) -> Any:
        tried.append(batch)
        return lambda: clock.passes(0.03 * batch)

    monkeypatch.setattr("benchmarks.suites.gpu.state.trainer", trainer)
    batch = calibrated({}, "cpu", 0.1)
    assert (batch, tried) == (4, [1, 2, 4])
