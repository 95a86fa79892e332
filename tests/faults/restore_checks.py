"""Checks that planted bugs in a restore that breaks off have to be caught by: each a plain function of an empty
directory, as in ``mutant_checks``."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from support.half_restores import DAMAGED, FAILURES, Refusing, made_state, spoil
from torch import nn

from asyncckpt import AsyncCkptError, Checkpointer, RngState, Run, Safetensors, StateMismatch


def _save(path: Path, step: int = 1, **state: Any) -> Run:
    with Checkpointer(path / "run", files=Safetensors(extent_bytes=4096)) as run:
        run.save(step, state).result()
    return Run(path / "run")


def _error(run: Run, state: Mapping[str, Any], **options: Any) -> AsyncCkptError:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run.restore(state, **options)
        except AsyncCkptError as error:
            return error
        except Exception as error:
            raise AssertionError(f"an error of no type of ours: {error!r}") from error
    raise AssertionError("nothing was raised")


def _bits(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone().tolist()
    if hasattr(value, "state_dict"):
        value = value.state_dict()
    if isinstance(value, Mapping):
        return {key: _bits(item) for key, item in value.items()}
    return [_bits(item) for item in value] if isinstance(value, list) else value


def _broken(root: Path, kind: str, failure: str) -> tuple[AsyncCkptError, set[str]]:
    """Return the error of a restore of which component ``odd`` fails, and the components that it has changed."""
    run = _save(root, **made_state(1, kind, 99))
    state = made_state(2, kind, 99)
    before = {name: _bits(value) for name, value in state.items()}
    if failure == DAMAGED:
        spoil(run, "odd")
    else:
        state["odd"].fault.fail_with(FAILURES[failure])
    error = _error(run, state, step=1)
    return error, {name for name, value in state.items() if _bits(value) != before[name]}


def what_changed_is_said(root: Path) -> None:
    for number, (kind, failure) in enumerate((("module", "refuses"), ("reaching", "lacks"), ("tensor", DAMAGED))):
        (root / str(number)).mkdir()
        error, changed = _broken(root / str(number), kind, failure)
        assert changed <= set(error.overwritten) <= changed | {"odd"}, (error.overwritten, changed)
        assert all(name in str(error) for name in changed)


def what_may_refuse_comes_first(root: Path) -> None:
    error, changed = _broken(root, "alone", "cannot read")
    assert changed <= {"odd"}, changed
    assert type(error) is StateMismatch, "an error of the component's own was taken for one of the storage"


def an_older_one_leaves_no_half(root: Path) -> None:
    _save(root, model=nn.Linear(64, 64))
    run = _save(root, 2, model=nn.Linear(64, 64), average=torch.arange(4096.0))
    spoil(run, "average")
    state = {"model": nn.Linear(64, 64), "average": torch.zeros(4096)}
    assert "average" in _error(run, state, strict=False).overwritten


class _Tied(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(50))
        self.two = self.one if tied else nn.Parameter(torch.zeros(50))


def tied_weights_get_one_value(root: Path) -> None:
    run = _save(root, model=_Tied(tied=False))
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = _Tied(tied=True)
        assert isinstance(_error(run, {"model": model}), StateMismatch)


def memory_that_takes_nothing_is_told(root: Path) -> None:
    run = _save(root, tensor=torch.ones(64), other=torch.ones(3))
    other = torch.zeros(3)
    freed = torch.zeros(64)
    freed.untyped_storage().resize_(32)
    for tensor in (torch.empty(64, device="meta"), freed):
        error = _error(run, {"other": other, "tensor": tensor})
        assert isinstance(error, StateMismatch)
        assert not other.any(), "something was written before"


def nothing_stays_on_the_meta_device_unsaid(root: Path) -> None:
    class Rotary(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.register_buffer("frequencies", torch.arange(4.0), persistent=False)

    run = _save(root, model=Rotary())
    with torch.device("meta"):
        model = Rotary()
    assert "model.frequencies" in str(_error(run, {"model": model}))


class _Drawing(Refusing):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        random.random()


def generators_are_set_last(root: Path) -> None:
    run = _save(root, rng=RngState(), object=_Drawing(1))
    expected = random.getstate()
    run = _save(root, 2, rng=RngState(), object=_Drawing(1))
    random.seed(5)
    run.restore({"rng": RngState(), "object": _Drawing(2)})
    assert random.getstate() == expected
