"""What goes into a checkpoint and out again has the same bits, whatever its dtype, shape and place in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from safetensors import safe_open
from safetensors.torch import save_file
from support.examples import examples
from support.foreign import Holder, bits, exported, imported, module_bits, saved, tensor, tensors

from asyncckpt import InvalidOption
from asyncckpt.convert.exporting import ExportOptions


@given(tensors())
@examples(60)
def test_safetensors_in_and_out_are_bit_exact(given: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain = {name: value.contiguous().clone() for name, value in given.items()}
        save_file(plain, Path(folder, "in.safetensors"))
        run, done = imported(Path(folder, "in.safetensors"), Path(folder, "run"))
        assert done.tensors == len(given)
        assert module_bits(run) == bits(plain)
        exported(run, Path(folder, "out.safetensors"))
        with safe_open(Path(folder, "out.safetensors"), "pt") as file:
            assert bits({name: file.get_tensor(name) for name in file.keys()}) == bits(plain)  # noqa: SIM118


@given(tensors())
@examples(60)
def test_a_pt_in_and_out_is_bit_exact_and_tied_names_stay_tied(given: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(given, Path(folder, "in.pt"))
        run, _ = imported(Path(folder, "in.pt"), Path(folder, "run"))
        assert module_bits(run) == bits(given)
        with run.open(1) as checkpoint:
            aliases = dict(checkpoint.manifest.components["model"].aliases)
        assert ("tied.to" in given) == bool(aliases)
        exported(run, Path(folder, "out.pt"))
        found = torch.load(Path(folder, "out.pt"), weights_only=True)
        assert bits(found) == bits(given)
        for alias, owner in aliases.items():
            assert found[alias].data_ptr() == found[owner].data_ptr()
        again, _ = imported(Path(folder, "out.pt"), Path(folder, "again"))
        assert module_bits(again) == bits(given)


@given(tensors())
@examples(40)
def test_what_a_module_holds_goes_out_to_each_format_and_comes_back(given: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = saved(Path(folder, "run"), {"model": Holder(given)})
        for name in ("out.pt", "out.safetensors"):
            exported(run, Path(folder, name))
            back, _ = imported(Path(folder, name), Path(folder, f"run of {name}"))
            assert module_bits(back) == bits(given), name
        exported(run, Path(folder, "shards"), format="safetensors-shards", options=ExportOptions(shard_bytes=64))
        back, _ = imported(Path(folder, "shards"), Path(folder, "run of shards"))
        assert module_bits(back) == bits(given)


def test_shards_have_an_index_that_names_the_file_of_each_tensor(tmp_path: Path) -> None:
    given = {f"layer.{n}": tensor(torch.float32, (10, 10), n) for n in range(5)}
    run = saved(tmp_path / "run", {"model": Holder(given)})
    exported(run, tmp_path / "out", format="safetensors-shards", options=ExportOptions(shard_bytes=900))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    run, done = imported(tmp_path / "out" / "model.safetensors.index.json", tmp_path / "again")
    assert module_bits(run) == bits(given)
    assert {*done.source["files"]} == {path.name for path in (tmp_path / "out").iterdir()}  # type: ignore[misc]


def test_what_safetensors_says_of_a_file_is_no_second_name_of_a_tensor(tmp_path: Path) -> None:
    given = {name: tensor(torch.float32, (2,), number) for number, name in enumerate(["pt", "1", "other"])}
    run = saved(tmp_path / "run", {"model": Holder(given)})
    exported(run, tmp_path / "out.safetensors")
    back, _ = imported(tmp_path / "out.safetensors", tmp_path / "back")
    assert module_bits(back) == bits(given)
    tied = saved(tmp_path / "tied", {"model": Holder({"w": given["pt"], "format": given["pt"]})})
    with pytest.raises(InvalidOption, match=r"'format' is a second name of 'w'.*--rename"):
        exported(tied, tmp_path / "tied.safetensors")


@pytest.mark.parametrize("left_out", ["", "c", "a"])
@pytest.mark.parametrize("ending", ["safetensors", "onnx"])
def test_large_tensors_are_exact_wherever_they_lie_in_their_blocks(
    tmp_path: Path, left_out: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from asyncckpt.convert import onnx_out
    from asyncckpt.convert.selection import Selection

    monkeypatch.setattr(onnx_out, "_EMBEDDED_BYTES", 1000)
    monkeypatch.setattr(onnx_out, "_EXTERNAL_BYTES", 1000)
    counts = {"a": 5_000_001, "b": 4096, "c": 999_999, "d": 3_000_000, "e": 1}
    given = {name: tensor(torch.float32, (count,), count) for name, count in counts.items()}
    run = saved(tmp_path / "run", {"model": Holder(given)})
    chosen = Selection(exclude=[left_out] if left_out else [])
    exported(run, tmp_path / f"out.{ending}", selection=chosen)
    back, _ = imported(tmp_path / f"out.{ending}", tmp_path / "back")
    assert module_bits(back) == bits({name: value for name, value in given.items() if name != left_out})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_dtype_rounds_to_the_nearest_ties_to_even_and_leaves_integers_alone(
    tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    values = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, float("nan"), float("inf"), -0.0])
    given = {"a": values, "ties": ties, "count": torch.arange(3), "eight": torch.ones(3).to(torch.float8_e4m3fn)}
    run = saved(tmp_path / "run", {"model": Holder(given)})
    exported(run, tmp_path / name, dtype=dtype)
    back, _ = imported(tmp_path / name, tmp_path / "back")
    wanted = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
    found = dict(back.load(component="model"))
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in wanted.items()}
    for key in wanted:
        assert torch.equal(found[key].double().nan_to_num(7.0), wanted[key].double().nan_to_num(7.0)), key


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_a_value_that_would_become_infinite_is_refused_by_name(tmp_path: Path, name: str) -> None:
    given = {"fine": torch.tensor([1.0, float("inf")]), "large": torch.tensor([1.0, 1e30])}
    run = saved(tmp_path / "run", {"model": Holder(given)})
    from asyncckpt import UnsupportedValue
    from asyncckpt.convert.selection import Selection

    with pytest.raises(UnsupportedValue, match=r"'large' has 1 values too large for torch.float16"):
        exported(run, tmp_path / name, dtype=torch.float16)
    assert not (tmp_path / name).exists()
    exported(run, tmp_path / name, dtype=torch.float16, selection=Selection(exclude=["large"]))


def test_an_optimizer_with_names_comes_back_as_one(tmp_path: Path) -> None:
    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        return model, torch.optim.AdamW(model.named_parameters(), lr=0.1)

    torch.manual_seed(0)
    model, optimizer = made()
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "in.pt")
    run, done = imported(tmp_path / "in.pt", tmp_path / "run")
    assert dict(done.components) == {"model": "module", "optimizer": "optimizer", "epoch": "plain"}
    torch.manual_seed(1)
    fresh, resumed = made()
    state: dict[str, Any] = {"model": fresh, "optimizer": resumed, "epoch": 0}
    run.restore(state, 1)
    assert bits(fresh.state_dict()) == bits(model.state_dict())
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())
    assert state["epoch"] == 3 or run.load(component="epoch") == 3
    exported(run, tmp_path / "out.pt", what="all")
    again, done = imported(tmp_path / "out.pt", tmp_path / "again")
    assert dict(done.components) == {"model": "module", "optimizer": "optimizer", "epoch": "plain"}
    torch.manual_seed(2)
    fresh, resumed = made()
    again.restore({"model": fresh, "optimizer": resumed, "epoch": 0}, 1)
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())


def test_an_optimizer_without_names_stays_the_tree_it_was(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}, tmp_path / "in.ckpt")
    run, done = imported(tmp_path / "in.ckpt", tmp_path / "run")
    assert dict(done.components) == {"model": "module", "optimizer_states": "plain"}
    fresh = torch.optim.Adam(model.parameters())
    fresh.load_state_dict(run.load(component="optimizer_states")[0])
    assert bits(fresh.state_dict()) == bits(optimizer.state_dict())
