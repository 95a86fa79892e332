"""Storage that hangs and comes back: training goes on meanwhile, the save is given up with a typed error, and what the
storage finishes later is not taken for a checkpoint."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.scenarios import SCENARIOS, Scenario, check_visible, leftovers, state_of

from asyncckpt import AsyncCkptError, Checkpointer, DurabilityUnknown, SaveAbandoned, StagingOptions, WriterOptions
from asyncckpt.commit import committer
from asyncckpt.storage import lease
from asyncckpt.storage.posix import PosixOps
from asyncckpt.testing import READING, InterceptedOps
from asyncckpt.testing.forgetful_fs import ForgetfulFS, reason_unavailable

pytestmark = [
    pytest.mark.skipif(reason_unavailable() is not None, reason=str(reason_unavailable())),
    pytest.mark.timeout(120),
]

#: A save's own deadline here, what is added before its thread is given up, and the longest training may wait.
_DURABLE, _GRACE, _STALL = 0.5, 0.3, 1.0
#: On top of a deadline, on a machine that has other things to do.
_SLACK = 3.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[ForgetfulFS]:
    with ForgetfulFS(tmp_path / "disk") as disk:
        try:
            yield disk
        finally:
            disk.go_on()


class _Hangs(InterceptedOps):
    """The storage hangs from the ``number``-th operation of this kind on."""

    def __init__(self, disk: ForgetfulFS, operation: str, number: int = 1) -> None:
        self.disk = disk
        self.operation = operation
        self.number = number
        self.hung = threading.Event()
        self._lock = threading.Lock()

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if name == self.operation and name not in READING:
            with self._lock:
                self.number -= 1
                if self.number == 0:
                    self.disk.stop()
                    self.hung.set()
        return args


def _timed(calls: list[float], call: Any) -> Any:
    began = time.monotonic()
    try:
        return call()
    finally:
        calls.append(time.monotonic() - began)


def _run(path: Path, scenario: Scenario) -> Checkpointer:
    options = WriterOptions(threads=2, durable_timeout_seconds=_DURABLE)
    return scenario.checkpointer(path, keep=(), every=1000, writer=options, stall_timeout_seconds=_STALL)


#: Where the storage hangs, and whether the save may be published when it is back: its name was being made.
PLACES = {
    ("mkdir", 1): False,
    ("open", 1): False,
    ("pwrite", 1): False,
    ("fsync", 1): False,
    ("write_file", 1): False,
    ("fsync_directory", 1): False,
    ("rename_noreplace", 1): True,
    ("fsync_directory", 3): True,
}
_FAST = [("open", 1), ("pwrite", 1), ("write_file", 1), ("rename_noreplace", 1)]


@pytest.mark.parametrize(
    "place",
    [place if place in _FAST else pytest.param(place, marks=pytest.mark.slow) for place in PLACES],
    ids=lambda place: f"{place[0]}-{place[1]}",
)
def test_training_goes_on_while_the_storage_hangs(
    place: tuple[str, int], disk: ForgetfulFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer, "_GRACE_SECONDS", _GRACE)
    path = Path(disk.path, "run")
    run = _run(path, SCENARIOS["safetensors"])
    run.prepare(state_of(0))
    run.save(1, state_of(1)).result()
    run.wait()
    ops = run._store.ops = _Hangs(disk, *place)
    calls: list[float] = []
    pending = _timed(calls, lambda: run.save(2, state_of(2)))
    assert ops.hung.wait(30)

    error: BaseException | None = None
    step, until = 3, time.monotonic() + _DURABLE + _GRACE + _SLACK
    while error is None and time.monotonic() < until:
        step += 1
        try:
            _timed(calls, lambda n=step: run.step(n, state_of(2)))
        except AsyncCkptError as raised:
            error = raised
        time.sleep(0.001)  # the training itself
    assert isinstance(error, SaveAbandoned | DurabilityUnknown), f"not given up in time, or untyped: {error!r}"
    assert "step 2" in str(error)
    assert disk.path in str(error)
    assert pending.failed()
    # a save may wait for as long as is documented, a step that saves nothing not at all
    assert max(calls) < _STALL + _SLACK / 2, f"training stood still for {max(calls):.1f} s"
    assert step > 20, "training hardly went on"

    disk.go_on()
    run._store.ops = PosixOps()
    assert _next_save(run) is None, "nothing can be saved, though the storage is back"
    run.close()
    found = check_visible(path)
    assert found[1] == 1
    assert found[99] == 99
    # what was given up is never published; what hung while its name was being made may be there, in one piece
    unknown = isinstance(error, DurabilityUnknown)
    assert set(found) <= ({1, 2, 99} if unknown else {1, 99})
    assert PLACES[place] or not unknown
    with _run(path, SCENARIOS["safetensors"]) as after:
        after.prepare(state_of(0))
    assert not leftovers(path)


def _next_save(run: Checkpointer) -> BaseException | None:
    """Of a run whose storage is back: a thread that was given up may hold things for a moment."""
    try:
        return run.save(99, state_of(99)).exception(30)
    except AsyncCkptError as raised:
        return raised


def test_closing_does_not_wait_for_storage_that_hangs(disk: ForgetfulFS, monkeypatch: pytest.MonkeyPatch) -> None:
    """It read the lease a last time, past every deadline: a job that was told to leave did not."""
    monkeypatch.setattr(committer, "_GRACE_SECONDS", _GRACE)
    monkeypatch.setattr(lease, "_RELEASE_SECONDS", 0.3)
    run = _run(Path(disk.path, "run"), SCENARIOS["safetensors"])
    run.save(1, state_of(1)).result()
    run.wait()
    disk.stop()
    errors: list[BaseException] = []

    def save_and_leave() -> None:
        try:
            with run:
                run.save(2, state_of(2))
        except SaveAbandoned as error:
            errors.append(error)

    leaving = threading.Thread(target=save_and_leave, daemon=True)
    leaving.start()
    leaving.join(_DURABLE + _GRACE + 0.3 + 2 * _SLACK)
    left = not leaving.is_alive()
    disk.go_on()
    leaving.join(30)
    assert left, "closing waits for the storage"
    assert "step 2" in str(errors[0])
    for thread in threading.enumerate():  # what hung comes to its end
        if thread.name == "asyncckpt-lease-release":
            thread.join(30)
    assert check_visible(Path(disk.path, "run")) == {1: 1}


@pytest.mark.parametrize("scenario", [SCENARIOS["safetensors"], SCENARIOS["zarr"]], ids=str)
def test_storage_that_comes_back_in_time_costs_nothing(scenario: Scenario, disk: ForgetfulFS) -> None:
    path = Path(disk.path, "run")
    run = scenario.checkpointer(path, keep=())
    run.prepare(state_of(0))
    run.save(1, state_of(1)).result()
    run.wait()
    ops = run._store.ops = _Hangs(disk, "fsync")
    calls: list[float] = []
    try:
        pending = run.save(2, state_of(2))
        assert ops.hung.wait(30)
        assert not pending.done()
        for step in range(3, 300):
            _timed(calls, lambda n=step: run.step(n, {}))
    finally:
        disk.go_on()
    assert max(calls) < _SLACK
    pending.result(30)
    run.close()
    assert check_visible(path) == {1: 1, 2: 2}


def test_a_run_that_begins_on_hung_storage_is_given_up_and_begins_when_it_is_back(disk: ForgetfulFS) -> None:
    path = Path(disk.path, "run")
    os.mkdir(path)
    disk.stop()
    run = Checkpointer(path, staging=StagingOptions(stall_timeout_seconds=0.3))
    try:
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(SaveAbandoned, match=r"run: the storage has not answered for 0 s.*another directory"):
                run.save(1, state_of(1))
            assert time.monotonic() - began < _SLACK
    finally:
        disk.go_on()
    deadline = time.monotonic() + 30
    while True:  # the directory that was asked for in the meantime is ours
        try:
            run.save(1, state_of(1)).result(30)
            break
        except SaveAbandoned:
            assert time.monotonic() < deadline
    run.close()
    assert check_visible(path) == {1: 1}


def test_a_run_that_gave_up_and_closed_leaves_the_directory_to_others(disk: ForgetfulFS) -> None:
    path = Path(disk.path, "run")
    os.mkdir(path)
    disk.stop()
    run = Checkpointer(path, staging=StagingOptions(stall_timeout_seconds=0.2))
    try:
        with pytest.raises(SaveAbandoned):
            run.save(1, state_of(1))
        run.close()
    finally:
        disk.go_on()
    opening = next((one for one in threading.enumerate() if one.name == "asyncckpt-opening"), None)
    if opening is not None:
        opening.join(30)
    with Checkpointer(path) as other:
        other.save(1, state_of(1)).result(30)
    assert check_visible(path) == {1: 1}
