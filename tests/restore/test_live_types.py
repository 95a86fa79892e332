"""What a training loop keeps beside tensors comes back in the types that live in the state it is restored into."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import logging
import pathlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from asyncckpt import Checkpointer, InvalidStep, Run, StateMismatch, UnsupportedValue


class Phase(enum.Enum):
    WARMUP = "warm"
    MAIN = "main"


class Score(NamedTuple):
    loss: float
    at: torch.Tensor


@dataclasses.dataclass
class Progress:
    epoch: int
    phase: Phase
    best: Score
    out: pathlib.Path
    since: datetime.datetime


NOW = datetime.datetime(2026, 5, 6, 7, 8, 9, 10, tzinfo=datetime.UTC)


def progress(epoch: int) -> Progress:
    best = Score(float(epoch), torch.full((3,), float(epoch)))
    return Progress(epoch, Phase.MAIN if epoch else Phase.WARMUP, best, pathlib.Path(f"out/{epoch}"), NOW)


class Tracker:
    """An object with a state of its own, in which there are values of its own types."""

    def __init__(self, epoch: int) -> None:
        self.progress = progress(epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"progress": self.progress, "version": torch.__version__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert type(state["version"]) is type(torch.__version__)
        self.progress = state["progress"]


class Layer(nn.Linear):
    """A module with extra state that is no tensor."""

    def __init__(self, epoch: int) -> None:
        super().__init__(2, 2)
        self.progress = progress(epoch)

    def get_extra_state(self) -> Progress:
        return self.progress

    def set_extra_state(self, state: Progress) -> None:
        self.progress = state


def state_of(epoch: int) -> dict[str, Any]:
    model = Layer(epoch)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "phase": progress(epoch).phase}], lr=0.1)
    return {
        "model": model,
        "optimizer": optimizer,
        "tracker": Tracker(epoch),
        "progress": progress(epoch),
        "plain": {"history": [progress(epoch)], "by_phase": {progress(epoch).phase: epoch}},
    }


def check(found: Progress, epoch: int) -> None:
    expected = progress(epoch)
    assert type(found) is Progress
    assert type(found.best) is Score
    assert torch.equal(found.best.at, expected.best.at)
    assert (found.epoch, found.phase, found.best.loss, found.out, found.since) == (
        expected.epoch,
        expected.phase,
        expected.best.loss,
        expected.out,
        expected.since,
    )


def test_every_kind_of_component_gets_its_types_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Checkpointer(tmp_path / "run", config=NOW) as run:
        run.save(1, state_of(4)).result(60)
    live = state_of(0)
    plain, seen = live["plain"], live["progress"].best.at
    with caplog.at_level(logging.WARNING, "asyncckpt"):
        Run(tmp_path / "run").restore(live)
    assert caplog.records == []
    check(live["model"].progress, 4)
    check(live["tracker"].progress, 4)
    check(live["progress"], 4)
    check(plain["history"][0], 4)
    assert plain["by_phase"] == {Phase.MAIN: 4}
    assert live["optimizer"].param_groups[0]["phase"] is Phase.MAIN
    assert torch.equal(seen, torch.full((3,), 4.0)), "a live tensor is filled in place, wherever it lies"


def test_what_has_no_live_type_is_plain_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"plain": {"history": [Score(0.5, torch.ones(1))], "phase": Phase.MAIN}}).result(60)
    live: dict[str, Any] = {"plain": {"history": [], "phase": None}}
    with caplog.at_level(logging.WARNING, "asyncckpt"):
        Run(tmp_path / "run").restore(live)
    assert live["plain"] == {"history": [(0.5, torch.ones(1))], "phase": "main"}
    (record,) = caplog.records
    assert "2 values" in record.getMessage()
    assert "plain['history'][0], plain['phase']" in record.getMessage()


def test_a_type_that_changed_is_a_mismatch_before_anything_is_touched(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Fewer:
        epoch: int

    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"model": nn.Linear(1, 1), "progress": [progress(4)]}).result(60)
    model, kept = nn.Linear(1, 1), Fewer(3)
    before = model.weight.clone()
    with pytest.raises(StateMismatch, match=r"progress\[0\]: Fewer lacks phase"):
        Run(tmp_path / "run").restore({"model": model, "progress": [kept]})
    assert torch.equal(model.weight, before)
    live = {"model": model, "progress": [kept]}
    report = Run(tmp_path / "run").restore(live, strict=False)
    assert report.mismatched
    assert live["progress"] == [Fewer(3)]


@pytest.mark.parametrize(
    ("value", "version"),
    [({"a": 1}, 1), ({"a": Phase.MAIN}, 4), ({"a": pathlib.Path("b")}, 4), ({"a": torch.__version__}, 4)],
    ids=["first", "enum", "path", "text"],
)
@pytest.mark.parametrize("where", ["state", "config"])
def test_a_manifest_asks_for_a_reader_that_knows_its_values(
    value: Any, version: int, where: str, tmp_path: Path
) -> None:
    with Checkpointer(tmp_path / "run", config=value if where == "config" else None) as run:
        run.save(1, {"plain": value if where == "state" else {}}).result(60)
    (manifest,) = (tmp_path / "run").glob("step-*/manifest.json")
    assert f'"format_version":{version},' in manifest.read_text()
    assert Run(tmp_path / "run").verify() == []


STEPS = [5, np.int64(5), np.uint8(5), np.array(5), torch.tensor(5), torch.tensor([5], dtype=torch.uint8)]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_a_step_is_any_whole_number(step: Any, tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", every=None) as run:
        report = run.save(step, {"plain": {}}).result(60)
        assert (type(report.step), report.step) == (int, 5)
        assert run.step(step, {"plain": {}}) is None
        run.restore({"plain": {}}, step)
    assert [(type(entry.step), entry.step) for entry in Run(tmp_path / "run").ls()] == [(int, 5)]


@pytest.mark.parametrize(
    "step",
    [-1, 5.0, True, "5", None, np.float64(5), np.bool_(1), np.int64(-1), torch.tensor(5.0), torch.tensor(True)],
    ids=str,
)
def test_what_is_no_whole_number_is_refused_by_save_and_by_step(step: Any, tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        for call in (run.save, run.step):
            with pytest.raises(InvalidStep, match="whole number"):
                call(step, {"plain": {}})
    assert Run(tmp_path / "run").ls() == []


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.eye(3).to_sparse(), "to_dense"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "int_repr"),
        (lambda: torch.empty(2, dtype=torch.bits8), "convert"),
        (lambda: torch.ones(2, device="meta"), "meta"),
    ],
    ids=["sparse", "quantised", "bits", "meta"],
)
def test_a_tensor_without_dense_values_is_refused_by_its_path(make: Any, words: str, tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run, pytest.raises(UnsupportedValue) as caught:
        run.save(1, {"plain": {"a": [Score(1.0, make())]}})
    assert "state['plain']['a.0.at']" in str(caught.value)
    assert words in str(caught.value)
