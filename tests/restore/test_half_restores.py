"""A restore that breaks off leaves every live object as it was, or says exactly which components it has changed."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits
from support.examples import thinned
from support.half_restores import DAMAGED, FAILURES, KINDS, Refusing, made_state, spoil

from asyncckpt import (
    AsyncCkptError,
    CheckpointDamaged,
    Checkpointer,
    NotEnoughMemory,
    NoUsableCheckpoint,
    RestoreFailed,
    Run,
    Safetensors,
    StateMismatch,
)
from asyncckpt.read import whole_tensors
from asyncckpt.storage.reader import LocalReader

SMALL = Safetensors(extent_bytes=4096)


def _save(path: Path, step: int, **state: Any) -> Run:
    with Checkpointer(path, files=SMALL) as run:
        run.save(step, state).result()
    return Run(path)


def _broken(call: Callable[[], Any]) -> BaseException:
    """Return what a call raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except BaseException as error:
            return error
    raise AssertionError("nothing was raised")


CASES = [
    (kind, failure, place)
    for kind, failures in KINDS.items()
    for failure in (*FAILURES, DAMAGED)
    for place in (0, 3, 99)
    if failure in failures
]


@pytest.mark.parametrize(("kind", "failure", "place"), thinned(CASES, 5))
def test_what_is_said_is_what_has_changed(kind: str, failure: str, place: int, tmp_path: Path) -> None:
    """Whatever fails, in a component of whatever kind, at whatever place in the state."""
    run = _save(tmp_path / "run", 1, **made_state(1, kind, place))
    state = made_state(2, kind, place)
    before = {name: bits(value) for name, value in state.items()}
    if failure == DAMAGED:
        assert spoil(run, "odd"), "it has no file to damage"
    else:
        state["odd"].fault.fail_with(FAILURES[failure])
    error = _broken(lambda: run.restore(state, step=1))
    changed = {name for name, value in state.items() if bits(value) != before[name]}
    if isinstance(error, AsyncCkptError):
        said, told = str(error), (error.overwritten, error.untouched)
        assert set(told[0]) | set(told[1]) == set(state)
        assert not set(told[0]) & set(told[1])
        # one that refuses may have changed before it did: nobody but its own class could tell
        assert changed <= set(told[0]) <= changed | {"odd"}, told
        assert not changed or all(f"{name}" in said for name in changed)
        assert isinstance(error, CheckpointDamaged if failure == DAMAGED else StateMismatch | NotEnoughMemory)
    else:
        assert isinstance(error, KeyboardInterrupt), error
        said = "".join(error.__notes__)
        assert all(name in said.partition("untouched")[0] for name in changed), said
    assert failure == DAMAGED or "odd" in said
    if kind in ("alone", "marked"):
        assert changed <= {"odd"}, "one that could be asked first was not"


def test_what_does_not_fit_is_told_before_anything_changes(tmp_path: Path) -> None:
    run = _save(tmp_path / "run", 1, **made_state(1))
    state = made_state(2)
    state["tensor"] = torch.zeros(5)
    before = {name: bits(value) for name, value in state.items()}
    error = _broken(lambda: run.restore(state))
    assert isinstance(error, StateMismatch)
    assert error.overwritten == ()
    assert error.untouched == tuple(state)
    assert {name: bits(value) for name, value in state.items()} == before


def test_an_older_checkpoint_replaces_all_that_a_damaged_one_has_left(tmp_path: Path) -> None:
    first, second = made_state(1), made_state(2)
    _save(tmp_path / "run", 1, **first)
    run = _save(tmp_path / "run", 2, **second)
    spoil(run, "model")
    state = made_state(3)
    with pytest.warns(RuntimeWarning, match=r"Overwritten, wholly or in part: .*model"):
        assert run.restore(state).step == 1
    expected = made_state(1)  # a generator of the process has moved on since
    assert {n: bits(v) for n, v in state.items() if n != "rng"} == {n: bits(expected[n]) for n in state if n != "rng"}


def test_half_of_a_damaged_one_never_stays_below_an_older_one(tmp_path: Path) -> None:
    """The older one has no average: with strict=False it would stay as the damaged one has left it."""
    _save(tmp_path / "run", 1, model=torch.nn.Linear(64, 64))
    run = _save(tmp_path / "run", 2, model=torch.nn.Linear(64, 64), average=torch.arange(4096.0))
    spoil(run, "average")
    state = {"model": torch.nn.Linear(64, 64), "average": torch.zeros(4096)}
    error = _broken(lambda: run.restore(state, strict=False))
    assert isinstance(error, StateMismatch)
    assert "average would stay" in str(error)
    assert "average" in error.overwritten
    fresh = {"model": torch.nn.Linear(64, 64), "average": torch.zeros(4096)}
    report = run.restore(fresh, step=1, strict=False)  # the way out that the message names
    assert report.missing == ("average",)
    assert not fresh["average"].any()


def test_what_was_left_alone_twice_is_no_half(tmp_path: Path) -> None:
    """What neither checkpoint fits was never changed by the damaged one."""
    _save(tmp_path / "run", 1, model=torch.nn.Linear(64, 64))
    run = _save(tmp_path / "run", 2, model=torch.nn.Linear(64, 64))
    spoil(run, "model")
    model = torch.nn.Sequential()
    model.weight, model.bias = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((64, 64), (64,)))
    model.head = torch.nn.Parameter(torch.zeros(2))
    with pytest.warns(RuntimeWarning):
        report = run.restore({"model": model}, strict=False)
    assert (report.step, report.missing) == (1, ("model.head",))


def test_where_all_are_damaged_it_is_said_what_they_have_left(tmp_path: Path) -> None:
    for step in (1, 2):
        run = _save(tmp_path / "run", step, model=torch.nn.Linear(64, 64), other=torch.arange(9))
        spoil(run, "model")
    error = _broken(lambda: run.restore({"model": torch.nn.Linear(64, 64), "other": torch.zeros(9).long()}))
    assert isinstance(error, NoUsableCheckpoint)
    assert "model" in error.overwritten
    assert "Overwritten" in str(error)


def test_ctrl_c_leaves_nobody_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = {"model": torch.ones(200_000), "other": torch.ones(200_000)}
    run = _save(tmp_path / "run", 1, **saved)
    real, main = LocalReader.read_into, threading.main_thread().ident
    numbers, calls = itertools.count(), []

    def slow(self: Any, name: str, *rest: Any) -> int:
        if name.endswith(".safetensors"):
            calls.append(name)
            time.sleep(0.02)
            if next(numbers) == 8:
                signal.pthread_kill(main or 0, signal.SIGINT)
        return real(self, name, *rest)

    monkeypatch.setattr(LocalReader, "read_into", slow)
    monkeypatch.setattr("asyncckpt.read.extents._READ_BYTES", 16 << 10)
    state = {"model": torch.zeros(200_000), "other": torch.zeros(200_000)}
    error = _broken(lambda: run.restore(state))
    found, read = bits(state), len(calls)
    assert isinstance(error, KeyboardInterrupt)
    assert "Overwritten, wholly or in part: model" in error.__notes__[0]
    time.sleep(0.3)
    assert (bits(state), len(calls)) == (found, read), "reader threads went on after the call had ended"


def test_an_error_of_the_device_is_typed_and_says_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _save(tmp_path / "run", 1, first=torch.ones(4096), second=torch.ones(4096))
    real, calls = whole_tensors.copy_small, []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 5:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        real(*args)

    monkeypatch.setattr(whole_tensors, "copy_small", failing)
    state = {"first": torch.zeros(4096), "second": torch.zeros(4096)}
    error = _broken(lambda: run.restore(state))
    assert isinstance(error, RestoreFailed)
    assert "illegal memory access" in str(error)
    assert set(error.overwritten) >= {name for name, value in state.items() if value.any()}


def test_an_error_of_ones_own_is_never_taken_for_damage(tmp_path: Path) -> None:
    """``load_state_dict`` may read files of its own: an older checkpoint of ours is no remedy for those."""
    for step in (1, 2):
        run = _save(tmp_path / "run", step, object=Refusing(step))
    for raised in (CheckpointDamaged("of another run"), FileNotFoundError(2, "vocabulary.txt")):
        broken = Refusing(3)
        broken.fault.fail_with(lambda raised=raised: raised)
        error = _broken(lambda broken=broken: run.restore({"object": broken}))
        assert type(error) is StateMismatch
        assert error.overwritten == ("object",)
        assert error.__cause__ is raised
        assert "object" in str(error)
        assert run.restore({"object": Refusing(3)}).step == 2, "the newest one was taken for damaged"


class _LooksAtModel(Refusing):
    """Its state is only right beside the model's."""

    def __init__(self, number: int, model: torch.nn.Module) -> None:
        super().__init__(number)
        self.seen = 0.0
        self._look = lambda: model.weight.sum().item()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.seen = self._look()


def test_an_object_that_reaches_a_module_finds_it_restored(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    run = _save(tmp_path / "run", 1, object=_LooksAtModel(1, model), model=model)
    other = torch.nn.Linear(3, 3)
    looking = _LooksAtModel(2, other)
    run.restore({"object": looking, "model": other})
    assert looking.seen == model.weight.sum().item()


def test_what_draws_while_it_loads_moves_no_generator(tmp_path: Path) -> None:
    from asyncckpt import RngState

    class Drawing(_LooksAtModel):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            super().load_state_dict(state)
            torch.rand(3), random.random()

    model = torch.nn.Linear(3, 3)
    torch.manual_seed(3)
    random.seed(3)
    run = _save(tmp_path / "run", 1, rng=RngState(), object=Drawing(1, model), model=model)
    expected = (torch.rand(2).tolist(), random.random())
    run.restore({"rng": RngState(), "object": Drawing(2, model), "model": model})
    assert (torch.rand(2).tolist(), random.random()) == expected
