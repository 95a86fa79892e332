"""What can be seen before anything is written: live memory that takes no values, that several names share, or that
nothing fills."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from conftest import bits
from torch import nn

from asyncckpt import Checkpointer, RngState, Run, StateMismatch, UnsupportedValue


def _saved(path: Path, **state: Any) -> Run:
    path.mkdir(exist_ok=True)
    with Checkpointer(path / "run") as run:
        run.save(1, state).result()
    return Run(path / "run")


class _Two(nn.Module):
    def __init__(self, *, tied: bool, last: float = 2.0) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(40, 30, bias=False), nn.Linear(40, 30, bias=False)
        with torch.no_grad():
            self.one.weight.fill_(1.0)
            self.two.weight.fill_(last)
        if tied:
            self.two.weight = self.one.weight


def _on_meta() -> nn.Module:
    with torch.device("meta"):
        return _Two(tied=True)


@pytest.mark.parametrize("make", [lambda: _Two(tied=True), _on_meta], ids=["in memory", "on meta"])
@pytest.mark.parametrize("strict", [True, False])
def test_two_stored_tensors_never_race_for_one_live_one(make: Any, strict: bool, tmp_path: Path) -> None:
    run = _saved(tmp_path, model=_Two(tied=False), other=torch.ones(3))
    model, other = make(), torch.zeros(3)
    with pytest.raises(StateMismatch, match=r"model\.(one|two)\.weight: shares its memory with model\.(one|two)") as e:
        run.restore({"model": model, "other": other}, strict=strict)
    assert e.value.overwritten == ()
    assert len(e.value.mismatched) == 1
    assert not other.any()
    assert model.one.weight.is_meta or (model.one.weight == 1.0).all()
    # the way out that the message names
    report = run.restore({"model": model}, rename=lambda name: None if name == "model.one.weight" else name)
    assert (model.two.weight == 2.0).all()
    assert model.one.weight is model.two.weight
    assert report.missing == ()


@pytest.mark.parametrize("make", [lambda: _Two(tied=True), _on_meta], ids=["in memory", "on meta"])
def test_equal_values_of_two_stored_tensors_fit_one_live_one(make: Any, tmp_path: Path) -> None:
    """As in checkpoints that were converted from formats that know no ties."""
    run = _saved(tmp_path, model=_Two(tied=False, last=1.0))
    model = make()
    run.restore({"model": model})
    assert (model.one.weight == 1.0).all()
    assert model.one.weight is model.two.weight


def test_what_was_tied_is_read_once_whoever_holds_it(tmp_path: Path) -> None:
    model = _Two(tied=True)
    run = _saved(tmp_path, model=model)
    other = _Two(tied=True, last=5.0)
    run.restore({"model": other})
    assert bits(other) == bits(model)
    separate = _Two(tied=False)
    run.restore({"model": separate})
    assert bits(separate) == bits(model)


def test_views_that_were_saved_beside_their_whole_come_back(tmp_path: Path) -> None:
    def state(whole: torch.Tensor) -> dict[str, Any]:
        return {"whole": whole, "columns": whole[:, ::2], "rest": whole[:, 1::2], "bytes": whole[0].view(torch.uint8)}

    run = _saved(tmp_path, **state(torch.randn(5, 8)))
    live = state(torch.zeros(5, 8))
    run.restore(live)
    assert bits(live) == bits({name.partition(".")[0]: value for name, value in run.load_tensors().items()})
    apart = {name: value.clone() for name, value in live.items()}
    apart["columns"] += 1
    run = _saved(tmp_path / "apart", **apart)
    live = state(torch.zeros(5, 8))
    with pytest.raises(StateMismatch, match="shares its memory with"):
        run.restore(live)
    assert not live["whole"].any()


def test_interleaved_views_share_nothing(tmp_path: Path) -> None:
    run = _saved(tmp_path, left=torch.ones(6, 3), right=torch.full((6, 3), 2.0))
    whole = torch.zeros(6, 6)
    run.restore({"left": whole[:, :3], "right": whole[:, 3:]})
    assert whole[:, :3].eq(1).all()
    assert whole[:, 3:].eq(2).all()


def _read_only() -> torch.Tensor:
    pages = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ)
    return torch.from_numpy(np.frombuffer(pages, dtype=np.float32))


def _freed() -> torch.Tensor:
    tensor = torch.zeros(mmap.PAGESIZE // 4)
    tensor.untyped_storage().resize_(0)
    return tensor


class _Wrapped(torch.Tensor):
    """Stands in for tensors that compute their values, such as quantized ones."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Self:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "detach" in str(func):
            return cls(torch.empty(args[0].shape))
        raise AssertionError(f"{func} was called")


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_read_only, "read-only.*clone"),
        (_freed, "0 bytes, too few"),
        (lambda: torch.empty(1024, device="meta"), "meta device"),
        (lambda: torch.zeros(32, 32).to_sparse(), "layout.*to_dense|shape"),
        (lambda: _Wrapped(torch.zeros(1024)), "_Wrapped.*convert it afterwards"),
        (nn.UninitializedParameter, "not initialised yet: run the module once"),
        (lambda: torch.quantize_per_tensor(torch.zeros(1024), 0.1, 0, torch.qint8), "quantize it afterwards"),
    ],
    ids=["read-only", "freed", "meta", "sparse", "subclass", "lazy", "quantized"],
)
def test_memory_that_takes_no_values_is_a_mismatch(make: Any, said: str, tmp_path: Path) -> None:
    run = _saved(tmp_path, tensor=torch.ones(1024), other=torch.ones(3))
    other = torch.zeros(3)
    state = {"tensor": make(), "other": other}
    with pytest.raises(StateMismatch, match=f"tensor: .*(?:{said})") as caught:
        run.restore(state)
    assert caught.value.mismatched
    assert not other.any()
    report = run.restore(state, strict=False)  # loads what fits
    assert len(report.mismatched) == 1
    assert other.all()


def test_memory_that_only_autograd_guards_is_filled(tmp_path: Path) -> None:
    run = _saved(tmp_path, leaf=torch.ones(8, 4), inference=torch.ones(8, 4))
    leaf = torch.zeros(4, 8).t().requires_grad_()
    with torch.inference_mode():
        inference = torch.zeros(4, 8).t()
    run.restore({"leaf": leaf, "inference": inference})
    assert leaf.detach().all()
    assert inference.all()


class _Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)


def test_a_buffer_that_nothing_fills_does_not_stay_on_the_meta_device_unsaid(tmp_path: Path) -> None:
    run = _saved(tmp_path, model=_Rotary())
    with torch.device("meta"):
        model = _Rotary()
    with pytest.raises(StateMismatch, match=r"model\.frequencies") as caught:
        run.restore({"model": model})
    assert caught.value.missing == ("model.frequencies",)
    assert "outside torch.device('meta')" in str(caught.value)
    assert model.linear.weight.is_meta, "it was touched"
    assert run.restore({"model": model}, strict=False).missing == ("model.frequencies",)
    model.frequencies = torch.arange(4.0)
    assert run.restore({"model": model}).missing == ()
    with torch.device("meta"):
        part = _Rotary()
    run.restore({"model": part}, include="model.linear.")  # of others nothing was asked
    assert not part.linear.weight.is_meta


def test_lazy_modules_are_told_to_run_once(tmp_path: Path) -> None:
    made = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d())
    with Checkpointer(tmp_path / "lazy") as run, pytest.raises(UnsupportedValue, match=r"0\.weight.*run the module"):
        run.save(1, {"model": made})
    made(torch.randn(3, 4))
    run = _saved(tmp_path, model=made)
    fresh = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d())
    with pytest.raises(StateMismatch, match=r"model\.1\.running_mean: not initialised yet: run the module once"):
        run.restore({"model": fresh})
    fresh(torch.randn(3, 4))
    run.restore({"model": fresh})
    assert bits(fresh) == bits(made)


def test_a_generator_that_was_not_saved_is_missed_before_any_is_set(tmp_path: Path) -> None:
    run = _saved(tmp_path, rng=RngState(), model=nn.Linear(2, 2))
    torch.manual_seed(99)
    model, before = nn.Linear(2, 2), torch.get_rng_state()
    rng = RngState({"data": torch.Generator()})
    weights = bits(model)
    before = torch.get_rng_state()
    with pytest.raises(StateMismatch, match=r"rng\.generators\.data"):
        run.restore({"rng": rng, "model": model})
    assert bits(model) == weights
    report = run.restore({"rng": rng, "model": model}, strict=False)
    assert report.missing == ("rng.generators.data",)
    assert torch.equal(torch.get_rng_state(), before)
