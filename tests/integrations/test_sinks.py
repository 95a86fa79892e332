"""Events arrive in the dashboards: real event files, a real registry, a stand-in for a W&B run."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Tiny, train

from asyncckpt import Checkpointer, InvalidOption, KeepLast, MissingExtra
from asyncckpt.events import Busy, Event, Failed, FellBack, Stalled, Subscriber
from asyncckpt.integrations.prometheus import PrometheusSink
from asyncckpt.integrations.tensorboard import TensorBoardSink
from asyncckpt.integrations.wandb import WandbSink


def save_twice(path: Path, tiny: tuple[Tiny, torch.optim.Optimizer], sink: Subscriber) -> list[int]:
    """Saves steps 1 and 2; their sizes in bytes, which differ by some digits in the manifests."""
    model, optimizer = tiny
    sizes = []
    with Checkpointer(path, every=1, keep=KeepLast(1), on_event=sink) as checkpointer:
        checkpointer.watch(optimizer)
        for step in (1, 2):
            train(model, optimizer)
            pending = checkpointer.step(step, {"model": model, "optimizer": optimizer})
            assert pending is not None
            sizes.append(pending.result().nbytes)
    return sizes


TROUBLE: list[Event] = [
    Failed(step=3, error=OSError("no")),
    Busy(step=4, policy="skip", in_flight=2),
    FellBack(step=2, path="x", reason="flipped"),
    Stalled(step=5, seconds=0.5, where="optimizer.step"),
]


def test_tensorboard_files_hold_the_saves_at_their_steps(
    tmp_path: Path, tiny: tuple[Tiny, torch.optim.Optimizer]
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path / "logs")
    sizes = save_twice(tmp_path / "run", tiny, sink)
    for event in TROUBLE:
        sink(event)
    sink.close()
    sink.close()
    log = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [(e.step, e.value) for e in log.Scalars("asyncckpt/bytes")] == [(1, sizes[0]), (2, sizes[1])]
    assert all(e.value > 0 for e in log.Scalars("asyncckpt/durable_seconds"))
    assert [e.step for e in log.Scalars("asyncckpt/failed")] == [3]
    assert [(e.step, e.value) for e in log.Scalars("asyncckpt/stall_in_optimizer_step_seconds")][-1] == (5, 0.5)


def test_a_writer_handed_in_stays_open() -> None:
    calls: list[tuple[str, float, int]] = []
    # no close(): the sink must not want one
    sink = TensorBoardSink(SimpleNamespace(add_scalar=lambda *call: calls.append(call)))
    sink(TROUBLE[0])
    sink.close()
    assert calls == [("asyncckpt/failed", 1.0, 3)]


def test_prometheus_counts_saves_bytes_and_trouble(tmp_path: Path, tiny: tuple[Tiny, torch.optim.Optimizer]) -> None:
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    sink = PrometheusSink(registry)
    sizes = save_twice(tmp_path / "run", tiny, sink)

    def value(name: str, **labels: str) -> float | None:
        found: float | None = registry.get_sample_value(name, labels)
        return found

    assert value("asyncckpt_saves_started_total") == value("asyncckpt_saves_total") == 2
    assert value("asyncckpt_durable_bytes_total") == sum(sizes)
    assert value("asyncckpt_checkpoint_bytes") == sizes[1]
    assert value("asyncckpt_last_durable_step") == 2
    assert value("asyncckpt_durable_seconds_count") == 2
    assert value("asyncckpt_stall_seconds_count", where="save") == 2
    assert value("asyncckpt_pruned_total") == 1
    assert value("asyncckpt_save_failures_total") == 0
    for event in TROUBLE:
        sink(event)
    assert value("asyncckpt_save_failures_total") == 1
    assert value("asyncckpt_busy_total", policy="skip") == 1
    assert value("asyncckpt_fallbacks_total") == 1
    assert value("asyncckpt_stall_seconds_sum", where="optimizer.step") == pytest.approx(0.5, abs=0.4)
    assert b"asyncckpt_last_durable_timestamp_seconds" in client.generate_latest(registry)


class FakeRun:
    """``log`` as W&B has it: a step that goes back is dropped."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, values))


class FakeWandb(FakeRun):
    def __init__(self) -> None:
        super().__init__()
        self.defined: dict[str, str] = {}

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.defined[name] = step_metric

    def log(self, values: dict[str, float], step: int | None = None, commit: bool = True) -> None:
        assert not commit, "would end the row training is still writing"
        super().log(values, step)


def test_a_plain_run_is_logged_at_the_checkpoints_step(
    tmp_path: Path, tiny: tuple[Tiny, torch.optim.Optimizer]
) -> None:
    run = FakeRun()
    sizes = save_twice(tmp_path / "run", tiny, WandbSink(run))
    rows = [(step, values["asyncckpt/bytes"]) for step, values in run.rows if "asyncckpt/bytes" in values]
    assert rows == [(1, sizes[0]), (2, sizes[1])]


def test_a_commit_after_later_steps_is_not_dropped_by_wandb(
    tmp_path: Path, tiny: tuple[Tiny, torch.optim.Optimizer]
) -> None:
    run = FakeWandb()
    save_twice(tmp_path / "run", tiny, WandbSink(run))
    assert run.defined == {"asyncckpt/*": "asyncckpt/step"}
    assert all(step is None for step, _ in run.rows)
    assert {values["asyncckpt/step"] for _, values in run.rows} == {1, 2}


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("torch.utils.tensorboard", lambda: TensorBoardSink("logs"), "asyncckpt[tensorboard]"),
        ("prometheus_client", PrometheusSink, "asyncckpt[prometheus]"),
        ("wandb", WandbSink, "asyncckpt[wandb]"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    module: str, make: Any, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra) as caught:
        make()
    assert f"pip install '{extra}'" in str(caught.value)


def test_without_an_active_wandb_run_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))
    with pytest.raises(InvalidOption, match=r"wandb\.init"):
        WandbSink()


def test_importing_the_sinks_imports_no_dashboard() -> None:
    for name in ("tensorboard", "prometheus", "wandb"):
        source = Path(importlib.import_module(f"asyncckpt.integrations.{name}").__file__ or "").read_text()
        unconditional = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
        assert not [line for line in unconditional if "prometheus_client" in line or "import wandb" in line]
        assert not [line for line in unconditional if "torch" in line]
