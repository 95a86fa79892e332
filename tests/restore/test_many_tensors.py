"""Plain tensors are planned and filled many at a time; what comes back is what comes back one by one."""

from __future__ import annotations

import mmap
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bits
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples
from torch import nn

from asyncckpt import Checkpointer, Run, Safetensors, StateMismatch
from asyncckpt.read.scatter import Window
from asyncckpt.read.whole_tensors import WholeTensors
from asyncckpt.restore import modules, plain_state
from asyncckpt.restore.live_memory import Memory
from asyncckpt.restore.plan import LiveTarget, RestorePlan
from asyncckpt.restore.shared_memory import _groups, span_bytes

_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_FORMS = ["plain", "plain", "plain", "transposed", "view", "tied", "empty", "scalar", "channels_last"]


class _Model(nn.Module):
    """Parameters of the given forms, filled from ``seed``."""

    def __init__(self, forms: list[tuple[str, torch.dtype]], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for number, (form, dtype) in enumerate(forms):
            shape = {"empty": (0, 3), "scalar": (), "channels_last": (2, 3, 4, 5)}.get(form, (number % 4 + 1, 301))
            value = torch.randn(shape, generator=generator).to(dtype)
            if form == "transposed":
                value = value.t()
            elif form == "view":
                value = torch.cat([value, value])[: len(value)]
            elif form == "channels_last":
                value = value.to(memory_format=torch.channels_last)
            parameter = nn.Parameter(value)
            if form == "tied" and number:
                parameter = self.get_parameter("p0")
            self.register_parameter(f"p{number}", parameter)
        self.register_buffer("counts", torch.randint(9, (3,), generator=generator))


def _state(forms: list[tuple[str, torch.dtype]], seed: int, *, steps: int) -> dict[str, Any]:
    model = _Model(forms, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 + seed, foreach=False)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
    return {"model": model, "optimizer": optimizer, "extra": {"x": torch.full((3,), float(seed)), "n": seed}}


def _restored(run: Run, state: dict[str, Any], options: dict[str, Any]) -> Any:
    try:
        report = run.restore(state, **options)
    except StateMismatch as error:
        return sorted(error.missing), sorted(error.unexpected), sorted(error.mismatched), bits(state)
    kept = [(value.dtype, value.stride()) for value in state["model"].parameters()]
    kinds = [(type(s), list(s)) for s in state["optimizer"].state.values()]
    return report.nbytes, report.whole, report.missing, report.unexpected, report.mismatched, kept, kinds, bits(state)


@examples(60)
@given(
    forms=st.lists(st.tuples(st.sampled_from(_FORMS), st.sampled_from(_DTYPES)), min_size=1, max_size=8),
    live_forms=st.none()
    | st.lists(st.tuples(st.sampled_from(_FORMS), st.sampled_from(_DTYPES)), min_size=1, max_size=8),
    saved_steps=st.integers(0, 1),
    live_steps=st.integers(0, 1),
    options=st.sampled_from([{}, {"strict": False}, {"dtype": torch.bfloat16}, {"include": "model.p"}]),
    extent_bytes=st.sampled_from([4096, 1 << 20]),
)
def test_many_at_a_time_is_as_one_by_one(
    forms: Any, live_forms: Any, saved_steps: int, live_steps: int, options: dict[str, Any], extent_bytes: int
) -> None:
    live_forms = forms if live_forms is None else live_forms
    with tempfile.TemporaryDirectory() as folder:
        with Checkpointer(f"{folder}/run", files=Safetensors(extent_bytes=extent_bytes)) as saver:
            saver.save(1, _state(forms, 1, steps=saved_steps)).result()
        run = Run(f"{folder}/run")
        fast = _restored(run, _state(live_forms, 2, steps=live_steps), options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WholeTensors, "take", lambda *_args: False)
            patch.setattr(modules, "fits_in_place", lambda *_args: False)
            patch.setattr(plain_state.PlainStates, "plan", lambda *_args: None)
            slow = _restored(run, _state(live_forms, 2, steps=live_steps), options)
    assert fast == slow


def test_state_that_fits_stays_where_it_is_and_other_state_is_made(tmp_path: Path) -> None:
    forms = [("plain", torch.float32)] * 3
    with Checkpointer(tmp_path / "run") as saver:
        saver.save(1, saved := _state(forms, 1, steps=2)).result()
    live = _state(forms, 2, steps=1)
    before = [value for state in live["optimizer"].state.values() for value in state.values()]
    parameters = list(live["model"].parameters())
    Run(tmp_path / "run").restore(live)
    after = [value for state in live["optimizer"].state.values() for value in state.values()]
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert all(one is other for one, other in zip(parameters, live["model"].parameters(), strict=True))
    assert bits(live) == bits(saved)
    fresh = _state(forms, 3, steps=0)
    Run(tmp_path / "run").restore(fresh)
    assert bits(fresh) == bits(saved)
    assert [list(state) for state in fresh["optimizer"].state.values()] == [["step", "exp_avg", "exp_avg_sq"]] * 3


_CHANGES: dict[str, Any] = {
    "order": lambda state: {key: state[key] for key in reversed(state)},
    "memory": lambda state: {**state, "exp_avg": state["exp_avg"].t().contiguous().t()},
    "kind": lambda state: {**state, "step": 1.0},
    "dtype": lambda state: {**state, "exp_avg": state["exp_avg"].double()},
    "less": lambda state: {"step": state["step"]},
    "more": lambda state: {**state, "more": torch.zeros(1)},
    "nothing": lambda state: {},
}


@pytest.mark.parametrize("change", _CHANGES)
def test_state_of_another_form_is_what_it_was_when_it_was_saved(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = [("plain", torch.float32)] * 3
    with Checkpointer(tmp_path / "run") as saver:
        saver.save(1, _state(forms, 1, steps=2)).result()

    def restored() -> Any:
        live = _state(forms, 2, steps=1)
        for parameter in list(live["optimizer"].state)[1:]:
            live["optimizer"].state[parameter] = _CHANGES[change](live["optimizer"].state[parameter])
        found = _restored(Run(tmp_path / "run"), live, {})
        return found, [value.stride() for state in live["optimizer"].state.values() for value in state.values()]

    fast = restored()
    monkeypatch.setattr(plain_state.PlainStates, "plan", lambda *_args: None)
    assert restored() == fast


def test_a_hook_of_the_module_still_sees_what_is_loaded(tmp_path: Path) -> None:
    forms = [("plain", torch.float32)] * 2
    with Checkpointer(tmp_path / "run") as saver:
        saver.save(1, {"model": _Model(forms, 1)}).result()
    live, seen = _Model(forms, 2), []
    live.register_load_state_dict_post_hook(lambda module, _keys: seen.append(module.p0.flatten()[0].item()))
    Run(tmp_path / "run").restore({"model": live})
    assert seen == [_Model(forms, 1).p0.flatten()[0].item()]


def test_values_of_another_dtype_of_the_same_size_are_converted(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as saver:
        saver.save(1, {"model": _Model([("plain", torch.float16)] * 2, 1)}).result()
    live = _Model([("plain", torch.bfloat16)] * 2, 2)
    Run(tmp_path / "run").restore({"model": live}, dtype=torch.bfloat16)
    assert torch.equal(live.p1, _Model([("plain", torch.float16)] * 2, 1).p1.to(torch.bfloat16))


def test_a_report_says_where_the_time_went(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as saver:
        saver.save(1, _state([("plain", torch.float32)], 1, steps=1)).result()
    for step in (None, 1):
        report = Run(tmp_path / "run").restore(_state([("plain", torch.float32)], 2, steps=1), step)
        parts = report.plan_seconds, report.read_seconds, report.load_seconds
        assert min(*parts, report.find_seconds) > 0
        assert sum(parts) <= report.seconds


# -- memory that is looked at in columns -----------------------------------------------------------------------------


@examples(100)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=10),
    data=st.data(),
)
def test_groups_are_those_whose_memory_meets(pieces: list[tuple[int, int, int]], data: st.DataObject) -> None:
    memory, apart = torch.zeros(80), torch.zeros(80)
    targets: list[tuple[LiveTarget, RestorePlan]] = []
    for number, (offset, size, stride) in enumerate(pieces):
        whole = data.draw(st.sampled_from([memory, memory, apart]))
        tensor = whole.as_strided((size,), (stride,), offset)
        targets.append((LiveTarget(None, Window(tensor), str(number)), RestorePlan()))
    targets.append((LiveTarget(None, Window(torch.zeros(1).expand(4)), "expanded"), RestorePlan()))
    spans = [(t.window.tensor.data_ptr(), t.window.tensor.data_ptr() + span_bytes(t.window.tensor)) for t, _ in targets]
    left, expected = set(range(len(targets))), set()
    while left:
        group = {min(left)}
        while more := {
            one
            for one in left - group
            if any(spans[one][0] < spans[other][1] and spans[other][0] < spans[one][1] for other in group)
        }:
            group |= more
        left -= group
        names = tuple(targets[number][0].where for number in sorted(group))
        if len(group) > 1 or names == ("expanded",):
            expected.add(names)
    assert {tuple(target.where for target, _ in group) for group in _groups(targets)} == expected


def test_memory_that_cannot_be_written_to_is_found_in_columns_too(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 16))
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once in a process that it is not writable
        whole = torch.from_numpy(np.frombuffer(mapped, np.float32))
    shrunk = torch.zeros(100)
    shrunk.untyped_storage().resize_(40)
    gone = torch.zeros(100)
    gone.untyped_storage().resize_(0)
    tensors = [
        torch.zeros(9), whole[5:9], torch.zeros(3, 4).t(), whole[::2], shrunk, gone, torch.zeros(0), whole[0:0],
        torch.zeros(2, device="meta"), torch.zeros(1).expand(5), torch.zeros(64)[3:9],
    ]  # fmt: skip
    expected = {number: problem for number, one in enumerate(tensors) if (problem := Memory().problem(one)) is not None}
    assert set(expected) == {1, 3, 4, 5, 8}
    assert Memory().problems(tensors) == expected
    assert Memory().problems([]) == {}


@examples(200)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4)), max_size=4),
    pieces=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), min_size=1, max_size=4),
)
def test_ranges_that_are_read_only_are_met_alike(ranges: list[tuple[int, int]], pieces: list[tuple[int, int]]) -> None:
    whole, memory = torch.zeros(40, dtype=torch.uint8), Memory()
    begin, reach = whole.data_ptr(), 0
    memory._read_only = []
    for first, size in sorted(ranges):
        if first >= reach:
            memory._read_only.append((begin + first, begin + first + size))
            reach = first + size
    tensors = [whole[first : first + size] for first, size in pieces]
    expected = {number for number, tensor in enumerate(tensors) if memory.problem(tensor) is not None}
    assert set(memory.problems(tensors)) == expected
