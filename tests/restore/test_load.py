"""``Run.load`` gives what was saved as plain containers and tensors, or fills what its caller gives; ``Run.config``
gives what a run was configured with."""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime
import enum
import io
import pathlib
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from asyncckpt import CheckpointDamaged, Checkpointer, InvalidOption, Run, StateMismatch, UnknownName


class Phase(enum.Enum):
    WARMUP = "warm"
    MAIN = "main"


class OldPhase(enum.Enum):
    OLD = "old"


class Score(NamedTuple):
    loss: float
    at: Any


@dataclasses.dataclass
class Settings:
    rate: float
    phase: Phase


class Loader:
    """An object with a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {"position": 7, "order": torch.arange(5), "phase": Phase.MAIN}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("nobody loads")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(4, 6, bias=False)
        self.second.weight = self.first.weight
        self.pictures = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        self.register_buffer("seen", torch.tensor(3))

    def get_extra_state(self) -> Any:
        return {"calls": 5, "mean": torch.ones(2)}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("nobody loads")


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "loader": Loader(),
        "mask": torch.tensor([True, False]),
        "notes": {"scores": [Score(0.5, torch.ones(2))], 3: "three", "array": np.arange(20_000), "path": Path("a")},
    }


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Run, dict[str, Any]]:
    held = state()
    with Checkpointer(tmp_path / "run", config={"settings": Settings(0.5, Phase.MAIN), "name": "a"}) as run:
        run.save(1, held).result()
    return Run(tmp_path / "run"), held


# -- without like ----------------------------------------------------------------------------------------------------


def test_everything_comes_back_as_plain_data(kept: tuple[Run, dict[str, Any]]) -> None:
    run, held = kept
    found = run.load()
    assert list(found) == list(held)
    assert torch.equal(found["mask"], held["mask"])
    assert found["loader"]["position"] == 7
    assert found["loader"]["phase"] == "main"
    assert torch.equal(found["loader"]["order"], torch.arange(5))
    assert found["notes"][3] == "three"
    assert found["notes"]["path"] == Path("a")
    assert type(found["notes"]["scores"][0]) is tuple
    assert np.array_equal(found["notes"]["array"], np.arange(20_000))


def test_a_module_is_a_mapping_of_its_names(kept: tuple[Run, dict[str, Any]]) -> None:
    run, held = kept
    found = run.load(1, "model")
    expected = held["model"].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items() if name != "_extra_state")
    assert found["first.weight"] is found["second.weight"]
    assert found["_extra_state"]["calls"] == 5
    assert found["pictures.weight"].stride() == expected["pictures.weight"].stride()


def test_torch_takes_an_optimizers_state_as_it_is(kept: tuple[Run, dict[str, Any]]) -> None:
    run, held = kept
    found = run.load(1, "optimizer")
    other = torch.optim.AdamW(Tied().parameters(), lr=1.0)
    other.load_state_dict(found)
    expected = held["optimizer"].state_dict()
    loaded = other.state_dict()
    assert loaded["param_groups"] == expected["param_groups"]
    for number, values in expected["state"].items():
        assert all(torch.equal(value, loaded["state"][number][key]) for key, value in values.items())
    assert torch.equal(found["state"]["first.weight"]["exp_avg"], expected["state"][0]["exp_avg"])


def test_nothing_of_the_program_is_needed(kept: tuple[Run, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = kept
    monkeypatch.setattr(Score, "__new__", None)
    monkeypatch.setattr(Settings, "__init__", None)
    assert run.load(1, "notes")["scores"][0][0] == 0.5


def test_a_dtype_converts_floating_tensors_and_nothing_inside_a_wrapper(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as run:
        run.save(
            1, {"a": {"x": torch.ones(2), "n": torch.ones(2).long(), "w": TwoTensor(torch.ones(2), torch.ones(2))}}
        )
    found = Run(tmp_path).load(component="a", dtype=torch.bfloat16)
    assert (found["x"].dtype, found["n"].dtype) == (torch.bfloat16, torch.int64)
    assert found["w"]["tensors"]["a"].dtype is torch.float32


def test_wrong_names_are_told(kept: tuple[Run, dict[str, Any]]) -> None:
    run, _ = kept
    with pytest.raises(UnknownName, match="'model'"):
        run.load(1, "modle")
    with pytest.raises(UnknownName, match="there are model"):
        run.load(1, like={"nothing": None})


def test_damaged_bytes_are_not_handed_out(kept: tuple[Run, dict[str, Any]]) -> None:
    run, _ = kept
    file = next(Path(run.path).glob("step-*/model-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    assert run.load(1, "notes")
    with pytest.raises(CheckpointDamaged):
        run.load(1, "model")


# -- like ------------------------------------------------------------------------------------------------------------


def test_tensors_of_like_are_filled_in_place(kept: tuple[Run, dict[str, Any]]) -> None:
    run, held = kept
    like = {name: torch.zeros_like(value) for name, value in held["model"].state_dict().items() if name[0] != "_"}
    found = run.load(1, "model", like)
    assert found.keys() == like.keys()
    assert all(found[name] is like[name] for name in like)
    assert all(torch.equal(like[name], value) for name, value in held["model"].state_dict().items() if name[0] != "_")


def test_only_what_like_has_is_read(kept: tuple[Run, dict[str, Any]]) -> None:
    run, held = kept
    found = run.load(1, like={"model": {"first.bias": None}, "notes": {3: None, "scores": None}})
    assert found["model"].keys() == {"first.bias"}
    assert torch.equal(found["model"]["first.bias"], held["model"].first.bias)
    assert found["notes"].keys() == {3, "scores"}
    for file in Path(run.path).glob("step-*/optimizer-*"):  # what is not asked for may be anything
        file.chmod(0o644)
        file.write_bytes(bytes(file.stat().st_size))
    assert run.load(1, like={"mask": None})["mask"].shape == (2,)


def test_meta_tensors_give_new_ones_of_their_shape_and_format(kept: tuple[Run, dict[str, Any]]) -> None:
    run, held = kept
    with torch.device("meta"):
        like = {"pictures.weight": torch.empty(4, 2, 3, 3), "first.bias": torch.empty(6, dtype=torch.bfloat16)}
    with pytest.raises(StateMismatch, match=r"load\(\.\.\., dtype=torch.bfloat16\) converts"):
        run.load(1, "model", like)
    found = run.load(1, "model", like, dtype=torch.bfloat16)
    assert found["pictures.weight"].is_contiguous()
    assert torch.equal(found["pictures.weight"], held["model"].pictures.weight)
    assert torch.equal(found["first.bias"], held["model"].first.bias.bfloat16())


def test_like_gives_types(kept: tuple[Run, dict[str, Any]]) -> None:
    run, _ = kept
    at = torch.zeros(2)
    like = {"notes": {"scores": [Score(0.0, at)]}, "loader": {"phase": Phase.WARMUP}}
    found = run.load(1, like=like)
    assert type(found["notes"]["scores"][0]) is Score
    assert found["notes"]["scores"][0].at is at
    assert torch.equal(at, torch.ones(2))
    assert found["loader"]["phase"] is Phase.MAIN


def test_what_load_gives_is_a_like(kept: tuple[Run, dict[str, Any]]) -> None:
    run, _ = kept
    like = run.load()
    like["optimizer"]["state"]["first.bias"]["exp_avg"].zero_()
    again = run.load(like=like)
    assert again["optimizer"]["state"]["first.bias"]["exp_avg"] is like["optimizer"]["state"]["first.bias"]["exp_avg"]
    assert again["optimizer"]["state"]["first.bias"]["exp_avg"].abs().sum() > 0


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"model": {"first.bias": torch.zeros(5)}}, r"model\.first\.bias: saved with shape \[6\], like has \[5\]"),
        ({"model": {"first.bias": torch.zeros(6).double()}}, "saved as torch.float32, like has torch.float64"),
        ({"model": {"first.bias": 1.5}}, "saved as a tensor, like has a float"),
        ({"model": {"nothing": None}}, r"missing from the checkpoint \(1\): model\.nothing"),
        ({"model": [1]}, "saved as a dict, like has a list"),
        ({"loader": {"position": torch.zeros(1)}}, "saved as a int, like has a tensor"),
        ({"notes": {"scores": []}}, r"notes\.scores: saved as 1 items, like has 0"),
        ({"notes": {"path": torch.zeros(1)}}, "like has a tensor"),
        ({"notes": {"4": None}}, r"missing.*notes\.4"),
        ({"mask": TwoTensor(torch.zeros(2), torch.zeros(2))}, "saved as a plain tensor, like has a TwoTensor"),
        ({"loader": {"phase": OldPhase.OLD}}, "no member"),
    ],
)
def test_what_does_not_fit_is_a_mismatch_before_anything_is_read(
    kept: tuple[Run, dict[str, Any]], like: dict[str, Any], words: str
) -> None:
    run, _ = kept
    untouched = torch.full((4, 2, 3, 3), 9.0)
    if isinstance(like.get("model"), dict):
        like["model"] = {"pictures.weight": untouched, **like["model"]}
    with pytest.raises(StateMismatch, match=words) as refused:
        run.load(1, like=like)
    assert refused.value.missing or refused.value.mismatched
    assert (untouched == 9).all()


def test_live_modules_are_told_of_restore(kept: tuple[Run, dict[str, Any]]) -> None:
    run, held = kept
    with pytest.raises(InvalidOption, match="call restore"):
        run.load(1, like={"model": held["model"]})
    with pytest.raises(InvalidOption, match="components by name"):
        run.load(1, like=[1])


def test_a_wrapper_is_a_dict_or_what_like_has(tmp_path: Path) -> None:
    value = TwoTensor(torch.arange(3.0), torch.ones(3))
    with Checkpointer(tmp_path) as run:
        run.save(1, {"a": {"w": value}})
    found = Run(tmp_path).load(1, "a")["w"]
    assert found["class"].endswith("TwoTensor")
    assert found["shape"] == (3,)
    rebuilt = TwoTensor.__tensor_unflatten__(found["tensors"], found["context"], torch.Size(found["shape"]), (1,))
    assert torch.equal(rebuilt.a, value.a)
    like = TwoTensor(torch.zeros(3), torch.zeros(3))
    assert Run(tmp_path).load(1, "a", {"w": like})["w"] is like
    assert torch.equal(like.a, value.a)
    again = copy.deepcopy(found)
    again["tensors"]["a"].zero_()
    assert torch.equal(Run(tmp_path).load(1, "a", {"w": again})["w"]["tensors"]["a"], value.a)
    assert torch.equal(again["tensors"]["a"], value.a), "filled in place"
    with pytest.raises(StateMismatch, match="shape"):
        Run(tmp_path).load(1, "a", {"w": TwoTensor(torch.zeros(4), torch.zeros(4))})


def test_a_dtensor_of_like_is_filled_or_made(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = torch.arange(12.0).view(4, 3)
        with Checkpointer(tmp_path) as run:
            run.save(1, {"a": {"rows": whole, "columns": whole}})
        real = distribute_tensor(torch.zeros(4, 3), mesh, [Shard(1)])
        meta = DTensor.from_local(torch.empty(4, 3, device="meta"), mesh, [Shard(0)], run_check=False)
        found = Run(tmp_path).load(1, "a", {"rows": meta, "columns": real})
        assert found["columns"] is real
        assert isinstance(found["rows"], DTensor)
        assert found["rows"].placements == (Shard(0),)
        assert torch.equal(found["rows"].full_tensor(), whole)
        assert torch.equal(real.full_tensor(), whole)
    finally:
        torch.distributed.destroy_process_group()


# -- config ----------------------------------------------------------------------------------------------------------


def test_the_configuration_is_readable(kept: tuple[Run, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = kept
    assert run.config() == {"settings": {"rate": 0.5, "phase": "main"}, "name": "a"}
    like = {"settings": Settings(0.0, Phase.WARMUP)}
    assert run.config(1, like)["settings"] == Settings(0.5, Phase.MAIN)
    with pytest.raises(StateMismatch, match="config"):
        run.config(1, {"settings": _Other(0.0)})
    with Checkpointer(tmp_path / "other") as other:
        other.save(1, {"a": 1}).result()
        assert other.config() is None


@dataclasses.dataclass
class _Other:
    speed: float


# -- any tree --------------------------------------------------------------------------------------------------------


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, TwoTensor):
        return type(b) is TwoTensor and _same([a.a, a.b], [b.a, b.b])
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | collections.deque):
        return len(a) == len(b) and all(map(_same, a, b))
    if dataclasses.is_dataclass(a):
        return _same(vars(a), vars(b))
    if isinstance(a, io.BytesIO):
        return (a.getvalue(), a.tell()) == (b.getvalue(), b.tell())
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and bool(np.array_equal(a, b))
    return bool(repr(a) == repr(b))


def _blank(value: Any) -> Any:
    """A like of the same form, whose tensors hold other values."""
    if isinstance(value, TwoTensor):
        return TwoTensor(torch.zeros_like(value.a), torch.zeros_like(value.b))
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, Score):
        return Score(0.0, _blank(value.at))
    if isinstance(value, dict):
        return type(value)((key, _blank(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(map(_blank, value))
    return value


_tensors = st.builds(
    lambda shape, dtype, seed: torch.randint(100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]),
    st.integers(0, 99),
)
_leaves = st.one_of(
    _tensors,
    st.builds(
        lambda tensor: TwoTensor(tensor, tensor.clone() + 1),
        _tensors.filter(lambda one: one.numel() > 0 and one.dtype != torch.bool),
    ),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    st.binary(max_size=4),
    st.sampled_from([Phase.WARMUP, Phase.MAIN, torch.float16, torch.Size((2, 3)), np.int64(7), np.arange(3), range(4)]),
    st.sampled_from([datetime.date(2026, 1, 2), datetime.timedelta(3), slice(1, None), pathlib.PurePosixPath("/a")]),
    st.builds(Settings, st.floats(0, 1), st.sampled_from(Phase)),
    st.binary(max_size=9).map(io.BytesIO),
)
_trees = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(collections.OrderedDict),
        st.builds(Score, st.floats(0, 1), inner),
    ),
    max_leaves=8,
)


@examples(200)
@given(_trees)
def test_any_tree_comes_back_into_its_like_and_into_the_live_state(value: Any) -> None:
    path = Path(tempfile.mkdtemp())
    try:
        with Checkpointer(path) as run:
            run.save(1, {"plain": {"value": value}}).result()
        reader = Run(path)
        like = {"value": _blank(value)}
        assert _same(reader.load(1, "plain", like)["value"], value)
        live = {"plain": {"value": _blank(value)}}
        reader.restore(live, 1)
        assert _same(live["plain"]["value"], value)
        reader.load(1)  # without a like it is plain data, whatever it is
        assert reader.verify(1) == []
    finally:
        shutil.rmtree(path)
