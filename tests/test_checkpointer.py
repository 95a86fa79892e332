"""The public surface: what users call, and what they get."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from conftest import bits

import asyncckpt
from asyncckpt import (
    ArenaBusy,
    Checkpointer,
    CheckpointerClosed,
    InvalidOption,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepSteps,
    Milestones,
    PendingSave,
    Run,
    RunOptions,
    StagingOptions,
    Steps,
    WriterOptions,
)
from asyncckpt.events import Busy, Committed, Event, Pruned, SaveStarted, Staged, Stalled, Written
from asyncckpt.integrations.chrome_trace import ChromeTrace
from asyncckpt.testing import GatedOps

PATIENCE_SECONDS = 20.0
STATE = {"w": torch.arange(1000.0), "meta": {"a": 1}}


def test_the_ten_line_loop(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer, "rng": asyncckpt.RngState()}
    total = 10
    for _ in range(2):  # the second run resumes at the end
        ckpt = Checkpointer(tmp_path / "run", every=Steps(3), keep=[KeepLast(2), KeepBest("loss", n=1, mode="min")])
        ckpt.watch(optimizer)
        start = ckpt.resume(state)
        with ckpt:
            for step in range(start, total):
                model(torch.ones(1, 3)).sum().backward()
                optimizer.step()
                ckpt.step(step + 1, state, metrics={"loss": -step})
        assert start in (0, 9)
    assert [entry.step for entry in Run(tmp_path / "run").ls()] == [6, 9]
    assert (tmp_path / "run" / "latest").read_text() == "step-00000009\n"


def test_a_pending_save_is_a_future_for_threads_and_for_asyncio(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        ops = run._store.ops = GatedOps()
        pending = run.save(1, STATE)
        seen: list[PendingSave] = []
        pending.add_done_callback(seen.append)
        with pytest.raises(TimeoutError):
            pending.result(0.01)
        assert not pending.done()
        assert "in flight" in repr(pending)

        async def wait_for_it() -> int:
            asyncio.get_running_loop().call_later(0.02, ops.gate.set)
            return (await pending).step

        assert asyncio.run(wait_for_it()) == 1
        assert run.wait(10)
        assert run._in_flight.wait_told(10)
        assert run.events.notifier.drain(10)
        assert seen == [pending]
        assert pending.result().nbytes == sum(f.stat().st_size for f in Path(pending.result().path).iterdir())
        assert pending.exception() is None


def test_several_saves_in_flight_up_to_the_limit(tmp_path: Path) -> None:
    events: list[Event] = []
    run = Checkpointer(
        tmp_path / "run", on_event=events.append, staging=StagingOptions(max_in_flight=2, budget_bytes=4 << 20)
    )
    with run:
        ops = run._store.ops = GatedOps()
        first, second = run.save(1, STATE), run.save(2, STATE)
        assert not first.done()
        assert not second.done()
        threading.Timer(0.05, ops.gate.set).start()
        run.save(3, STATE)
        assert first.done(), "the third save had to wait for the first"
    busy = [event for event in events if isinstance(event, Busy)]
    assert [(event.step, event.policy, event.in_flight) for event in busy] == [(3, "wait", 2)]
    assert [entry.step for entry in run.ls()] == [1, 2, 3]


def test_on_busy_skip_leaves_step_free_and_explicit_saves_wait(tmp_path: Path) -> None:
    events: list[Event] = []
    with Checkpointer(
        tmp_path / "run", every=1, on_event=events.append, staging=StagingOptions(on_busy="skip", max_in_flight=1)
    ) as run:
        ops = run._store.ops = GatedOps()
        assert run.step(1, STATE) is not None
        assert run.step(2, STATE) is None
        assert run.events.notifier.drain(10)
        assert [event.policy for event in events if isinstance(event, Busy)] == ["skip"]
        threading.Timer(0.05, ops.gate.set).start()
        run.save(3, STATE).result()
    assert [entry.step for entry in run.ls()] == [1, 3]


def test_on_busy_error(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", staging=StagingOptions(on_busy="error", max_in_flight=1)) as run:
        ops = run._store.ops = GatedOps()
        run.save(1, STATE)
        with pytest.raises(ArenaBusy, match=r"step 2.*steps 1"):
            run.save(2, STATE)
        ops.gate.set()
        run.wait()
        run.save(2, STATE).result()


def test_every_stage_is_reported_in_order(tmp_path: Path) -> None:
    events: list[Event] = []
    with Checkpointer(tmp_path / "run", on_event=events.append, keep=KeepLast(1)) as run:
        run.save(1, STATE).result()
        report = run.save(2, STATE).result()
    of_two = [type(event) for event in events if event.step == 2]
    for kind in (SaveStarted, Stalled, Staged, Written, Committed):
        assert of_two.count(kind) == 1
    order = sorted((event for event in events if event.step == 2), key=lambda event: event.at_seconds)
    assert [type(e) for e in order if isinstance(e, SaveStarted | Staged | Written | Committed)] == [
        SaveStarted,
        Staged,
        Written,
        Committed,
    ]
    committed = next(event for event in order if isinstance(event, Committed))
    assert committed.nbytes == report.nbytes
    assert committed.durable_seconds == report.durable_seconds > 0
    assert [event.name for event in events if isinstance(event, Pruned)] == ["step-00000001"]


def test_a_subscriber_that_raises_harms_nothing(tmp_path: Path) -> None:
    def broken(_event: Event) -> None:
        raise RuntimeError("dashboard down")

    with Checkpointer(tmp_path / "run", on_event=broken) as run:
        assert run.save(1, STATE).result().step == 1


def test_a_kept_pending_save_keeps_no_tensors(tmp_path: Path) -> None:
    tensor = torch.zeros(1000)
    gone = weakref.ref(tensor)
    with Checkpointer(tmp_path / "run") as run:
        pending = run.save(1, {"w": tensor})
        pending.result()
        run.wait()
        del tensor
        gc.collect()
        assert gone() is None
        assert pending.done()


def test_leaving_waits_for_what_is_in_flight(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        ops = run._store.ops = GatedOps()
        run.save(1, STATE)
        threading.Timer(0.05, ops.gate.set).start()
    assert [entry.step for entry in run.ls()] == [1]
    with pytest.raises(CheckpointerClosed):
        run.save(2, STATE)


def test_a_script_that_forgets_to_close_still_finishes_and_says_so(tmp_path: Path) -> None:
    script = f"""
import torch, asyncckpt
run = asyncckpt.Checkpointer({str(tmp_path / "run")!r}, staging=asyncckpt.StagingOptions(budget_bytes=1 << 20))
run.save(1, {{"w": torch.zeros(200_000)}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert "leaving with 1 saves not durable yet" in done.stderr or not done.stderr
    assert Run(tmp_path / "run").verify(1) == []


def test_going_back_on_purpose(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", run=RunOptions(overwrite=True)) as run:
        for step in (1, 2, 3):
            run.save(step, {"w": torch.full((10,), step)}).result()
        live = {"w": torch.zeros(10, dtype=torch.int64)}
        run.restore(live, 1)
        assert live["w"].tolist() == [1] * 10
        run.save(2, {"w": torch.full((10,), 22)}).result()
        assert run.load_tensors(2)["w.value"].tolist() == [22] * 10
        assert run.verify(2) == []
        run.wait()
        assert not [name for name in os.listdir(tmp_path / "run") if name.startswith((".trash", ".tmp", ".replaced"))]


def test_names_from_a_template(tmp_path: Path) -> None:
    name = "checkpoint_step_{step}_loss_{loss:.4f}"
    with Checkpointer(tmp_path / "run", run=RunOptions(name=name)) as run:
        with pytest.raises(InvalidOption, match=r"needs metrics=\{'loss'"):
            run.save(1, STATE)
        run.save(10000, STATE, metrics={"loss": 2.34561}).result()
        run.save(10001, STATE, metrics={"loss": float("nan")}).result()
        assert [entry.name for entry in run.ls()] == [
            "checkpoint_step_10000_loss_2.3456",
            "checkpoint_step_10001_loss_nan",
        ]
        assert run.resume(dict(STATE)) == 10001


def test_retention_composes_and_pins_protect(tmp_path: Path) -> None:
    keep = [KeepLast(1), KeepEvery(4), KeepBest("loss", n=1, mode="min"), KeepSteps([5])]
    with Checkpointer(tmp_path / "run", keep=keep) as run:
        for step in range(1, 10):
            run.save(step, STATE, metrics={"loss": abs(step - 3)}).result()
            run.wait()
            if step == 2:
                run.pin(2)
        assert [entry.step for entry in run.ls()] == [2, 3, 4, 5, 8, 9]
        run.unpin(2)
        assert [entry.step for entry in run.prune(dry_run=True)] == [2]
        assert [entry.step for entry in run.prune()] == [2]


def test_a_checkpoint_that_is_being_read_is_not_deleted(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", keep=KeepLast(1)) as run:
        run.save(1, STATE).result()
        reader = Run(tmp_path / "run").open(1)
        run.save(2, STATE).result()
        run.wait()
        assert [entry.step for entry in run.ls()] == [1, 2]
        reader.close()
        run.prune()
        assert [entry.step for entry in run.ls()] == [2]


def test_weights_only_checkpoints_are_for_inference_and_leave_resume_alone(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    state = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), momentum=0.9)}
    with Checkpointer(tmp_path / "run", keep=KeepLast(1)) as run:
        run.save(1, state).result()
        run.save(2, state, weights_only=True).result()
        run.wait()
        assert [(entry.step, entry.kind, entry.name) for entry in run.ls()] == [
            (1, "full", "step-00000001"),
            (2, "weights", "weights-step-00000002"),
        ]
        assert run.resume(state) == 1
        assert set(run.load_tensors(2)) == {"model.weight", "model.bias"}


def test_milestones_and_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpointer(tmp_path / "run", every=[Milestones([3]), asyncckpt.Minutes(1)]) as run:
        assert [step for step in range(1, 6) if run.step(step, STATE)] == [3]
        clock = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 61)
        assert run.step(7, STATE) is not None
        monkeypatch.undo()


def test_a_state_larger_than_the_arena(tmp_path: Path) -> None:
    state = {"w": torch.randn(2_000_000)}  # 8 MB through 1 MiB
    with Checkpointer(tmp_path / "run", staging=StagingOptions(budget_bytes=1 << 20)) as run:
        run.save(1, state).result()
        assert bits(run.load_tensors(1)["w.value"]) == bits(state["w"])
        assert run._arena.budget_bytes == 1 << 20


def test_a_state_that_grows(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        for step, size in enumerate((10, 100_000, 3_000_000, 5), 1):
            tensor = torch.randn(size)
            run.save(step, {"w": tensor}).result()
            assert bits(run.load_tensors(step)["w.value"]) == bits(tensor)


@pytest.mark.parametrize("digest", ["xxh3-128", "crc32c", "blake3", "sha256"])
def test_the_digest_is_selectable_and_named_in_the_manifest(digest: str, tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", writer=WriterOptions(digest=digest)) as run:
        path = Path(run.save(1, STATE).result().path)
        assert f'"digest":"{digest}"'.encode() in (path / "manifest.json").read_bytes()
        assert run.verify(1) == []
        shard = path / "w-00001-of-00001.safetensors"
        data = bytearray(shard.read_bytes())
        data[5000] ^= 1
        shard.write_bytes(data)
        assert run.verify(1)


def test_threads_and_memory_go_when_it_is_closed(tmp_path: Path) -> None:
    before = threading.active_count()
    for number in range(3):
        with Checkpointer(tmp_path / f"run{number}", writer=WriterOptions(threads=4)) as run:
            run.save(1, STATE).result()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_forked_child_cannot_use_the_parents_checkpointer(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, STATE).result()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pid = os.fork()
        if pid == 0:
            try:
                run.save(2, STATE)
            except CheckpointerClosed:
                os._exit(7)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        run.save(2, STATE).result()
    gc.collect()


@pytest.mark.parametrize("close", [True, False], ids=["closed", "dropped"])
def test_a_checkpointer_that_is_done_with_keeps_neither_itself_nor_its_memory(close: bool, tmp_path: Path) -> None:
    """A notebook makes one after the other in one process: each holds memory for a whole state."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    run = Checkpointer(tmp_path / "run")
    run.watch(optimizer)
    run.save(1, {"model": model}).result()
    run.wait()
    arena, itself = weakref.ref(run._arena._regions[0]), weakref.ref(run)
    if close:
        run.close()
        assert arena() is None, "closed, and its memory is still there"
    del run
    deadline = time.monotonic() + PATIENCE_SECONDS
    # threads may be telling it that the save has ended, or be on their own way out with the last reference
    while (itself() is not None or arena() is not None) and time.monotonic() < deadline:
        gc.collect()
    assert itself() is None
    assert arena() is None
    optimizer.step()  # the hooks of one that is gone do nothing


def test_a_relative_path_stays_where_it_was_when_the_program_changes_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Checkpointer("run") as run:
        looked, events = Run("run"), ChromeTrace("trace.json")
        run.save(1, STATE).result()
        monkeypatch.chdir(tmp_path / "elsewhere")
        run.save(2, STATE).result()
        assert [entry.step for entry in looked.ls()] == [1, 2]
        events.close()
    assert os.listdir(tmp_path / "elsewhere") == []
    assert run.path == str(tmp_path / "run")


def test_loss_that_training_has_computed_is_a_metric_as_it_is(tmp_path: Path) -> None:
    loss = torch.ones(3, requires_grad=True).sum()
    with Checkpointer(tmp_path) as run:
        run.save(1, STATE, metrics={"loss": loss})
    assert run.ls()[0].metrics == {"loss": 3.0}
