"""The Chrome trace: valid JSON, rows by stage and thread, and never half a file."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, train

from asyncckpt import Checkpointer, InvalidOption, KeepLast
from asyncckpt.events import Committed, Event, ExtentStaged, Failed, SaveStarted
from asyncckpt.integrations.chrome_trace import ChromeTrace


def read(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def rows(events: list[dict[str, Any]]) -> dict[int, str]:
    return {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}


def test_a_real_save_leaves_every_stage_on_the_axis(tmp_path: Path, tiny: tuple[Tiny, torch.optim.Optimizer]) -> None:
    model, optimizer = tiny
    path = tmp_path / "trace.json"
    state = {"model": model, "optimizer": optimizer}
    with (
        ChromeTrace(path) as trace,
        Checkpointer(tmp_path / "run", every=1, keep=KeepLast(1), on_event=trace) as checkpointer,
    ):
        checkpointer.watch(optimizer)
        for step in (1, 2):
            with trace.span("train", step=step):
                train(model, optimizer)
            checkpointer.step(step, state)
        checkpointer.wait()
        assert checkpointer.restore(state).step == 2
    events = read(path)
    assert {"training", "stall", "staging", "writing", "commit", "restore", "retention", "save"} <= {
        e["cat"] for e in events if "cat" in e
    }
    names = rows(events)
    for event in events:
        assert event["ph"] in {"X", "i", "M", "b", "e"}
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert names[event["tid"]].startswith(event["cat"])
    assert [(e["ph"], e["id"]) for e in events if e.get("cat") == "save" and e["id"] == 1] == [("b", 1), ("e", 1)]
    assert next(e for e in events if e["name"] == "train")["args"] == {"step": 1}


def test_times_are_microseconds_and_spans_end_where_the_event_was(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path / "trace.json")
    trace(ExtentStaged(step=3, at_seconds=10.0, nbytes=7, seconds=0.25))
    trace.close()
    (event,) = [e for e in read(tmp_path / "trace.json") if e["ph"] == "X"]
    assert (event["ts"], event["dur"], event["args"]) == (9_750_000.0, 250_000.0, {"step": 3, "bytes": 7})


def test_each_thread_has_its_own_row_of_a_stage(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path / "trace.json")

    def stage() -> None:
        trace(ExtentStaged(step=1, nbytes=1, seconds=0.0))

    threads = [threading.Thread(target=stage, name=f"copier-{n}") for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace.close()
    assert sorted(rows(read(tmp_path / "trace.json")).values()) == [f"staging (copier-{n})" for n in range(3)]


def test_a_failed_save_is_ended_and_an_unknown_one_is_not(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path / "trace.json")
    trace(SaveStarted(step=1, nbytes=1, deferred=True))
    trace(Failed(step=1, error=OSError("disk on fire")))
    trace(
        Committed(
            step=2, path="x", nbytes=1, written_bytes=1, durable_seconds=0.1, stall_seconds=0.0, commit_seconds=0.1
        )
    )  # began before this trace did
    trace.close()
    events = read(tmp_path / "trace.json")
    assert [(e["ph"], e["id"]) for e in events if e.get("cat") == "save"] == [("b", 1), ("e", 1)]
    assert any(e["args"].get("error") == "disk on fire" for e in events)


def test_an_event_of_a_new_kind_is_recorded_by_its_name(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path / "trace.json")
    trace(Event(step=1))
    trace.close()
    assert any(e["name"] == "Event" for e in read(tmp_path / "trace.json"))


def test_an_endless_run_does_not_fill_the_memory(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path / "trace.json", max_events=10)
    for step in range(1000):
        trace.add_span(f"step {step}", step, step + 0.5)
    trace.close()
    kept = [e["name"] for e in read(tmp_path / "trace.json") if e["ph"] == "X"]
    assert kept == [f"step {n}" for n in range(990, 1000)]


def test_flush_can_be_repeated_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path / "trace.json")
    trace.flush()
    with pytest.raises(ZeroDivisionError), trace.span("fails"):
        raise ZeroDivisionError
    trace.close()
    trace.close()
    trace(Event(step=1, at_seconds=time.perf_counter()))
    assert [e["name"] for e in read(tmp_path / "trace.json") if e["ph"] == "X"] == ["fails"]
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_a_failed_flush_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    trace = ChromeTrace(tmp_path / "trace.json")
    trace.flush()
    before = (tmp_path / "trace.json").read_bytes()
    trace.add_span("\ud800", 0.0, 1.0, bad={("not", "a", "key"): 1})
    with pytest.raises(TypeError):
        trace.close()
    assert (tmp_path / "trace.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_a_budget_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="max_events"):
        ChromeTrace(tmp_path / "trace.json", max_events=0)
