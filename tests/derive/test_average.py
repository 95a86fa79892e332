"""``average``: what the result holds, that it is a checkpoint like any other, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.disk_faults import strike_everywhere
from support.examples import examples
from typer.testing import CliRunner

from asyncckpt import (
    CheckpointDamaged,
    Checkpointer,
    CheckpointNotFound,
    Delta,
    InvalidOption,
    KeepLast,
    Run,
    RunLocked,
    Safetensors,
    StateMismatch,
    Zarr,
)
from asyncckpt.cli.app import app
from asyncckpt.derive import average, writing
from asyncckpt.derive.blend import Blend, accumulator_of, ema_weights, fractions_of
from asyncckpt.state.dtypes import CODES

NAN, INF = math.nan, math.inf


class Model(torch.nn.Module):
    """Has a weight, a tied one, a bf16 one, a normalisation with a counter, and what is never trained."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(5000, dtype=torch.float32) * value)
        self.tied = self.w
        self.low = torch.nn.Parameter(torch.full((33, 3), value, dtype=torch.bfloat16))
        self.norm = torch.nn.BatchNorm1d(4)
        self.norm.num_batches_tracked.fill_(int(value))
        self.register_buffer("mask", torch.full((3,), -INF))
        self.register_buffer("frozen", torch.tensor([0.1, 1 / 3, 1e-30]))


def state(value: float) -> dict[str, Any]:
    model = Model(value)
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters()), "meta": {"value": value}}


def saved(path: Path, values: dict[int, float], **options: Any) -> Path:
    with Checkpointer(path, **options) as run:
        for step, value in values.items():
            run.save(step, state(value), metrics={"loss": value}).result()
    return path


def loaded(path: Path, name: str) -> dict[str, torch.Tensor]:
    return Run(path).load_tensors(name)


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 3.0),
        ({"weights": [3, 1, 2]}, (3 * 1 + 1 * 2 + 2 * 6) / 6),
        ({"decay": 0.5}, 0.25 * 1 + 0.25 * 2 + 0.5 * 6),
    ],
    ids=["uniform", "weighted", "ema"],
)
def test_weights_are_averaged_and_all_else_is_the_newests(options: Any, expected: float, tmp_path: Path) -> None:
    path = saved(tmp_path / "run", {10: 1.0, 20: 2.0, 30: 6.0})
    done = average(path, [10, 20, 30], **options)
    found = loaded(path, done.name)
    torch.testing.assert_close(found["model.w"], torch.arange(5000) * expected, rtol=1e-6, atol=0)
    assert torch.equal(found["model.w"], found["model.tied"])
    assert torch.equal(found["model.low"], torch.full((33, 3), expected, dtype=torch.bfloat16))
    assert found["model.norm.num_batches_tracked"] == 6
    assert torch.equal(found["model.mask"], torch.full((3,), -INF))
    assert torch.equal(found["model.frozen"], torch.tensor([0.1, 1 / 3, 1e-30]))
    assert {name.partition(".")[0] for name in found} == {"model"}


def test_the_order_in_which_steps_are_given_is_that_of_the_weights_and_not_of_age(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", {10: 1.0, 20: 3.0})
    done = average(path, [20, 10], weights=[3, 1])
    assert done.weights == ((10, 0.25), (20, 0.75))
    assert loaded(path, done.name)["model.low"].unique().tolist() == [2.5]
    done = average(path, [20, 10], decay=0.75)
    assert done.weights == ((10, 0.75), (20, 0.25))


def test_the_result_is_a_checkpoint_like_any_other(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", {10: 1.0, 20: 3.0}, config={"width": 3}, assets={"config.json": b"{}"})
    done = average(path, last=2, name="soup")
    run = Run(path)
    assert run.verify("soup") == [] == run.verify(done.name, require="model")
    with run.open("soup") as opened:
        manifest = opened.manifest
    parents = [entry.attempt for entry in run.ls() if entry.kind == "full"]
    assert (manifest.step, manifest.kind, manifest.name) == (20, "weights", "average-step-00000020")
    assert [row["attempt"] for row in manifest.derived["from"]] == parents
    assert (manifest.derived["by"], manifest.derived["method"]) == ("average", "uniform")
    assert manifest.metrics == {}
    assert run.config("soup") == {"width": 3}
    assert run.assets("soup") == {"config.json": b"{}"}
    model = Model(0)
    run.restore({"model": model}, "soup")
    assert model.low.unique().tolist() == [2.0]
    assert "an average of others" in call("ls", path).stdout
    assert "made by average of: step 10 (0.5), step 20 (0.5)" in call("show", path, "soup").stdout


def test_training_goes_on_as_if_it_were_not_there(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", {10: 1.0, 20: 3.0, 30: 5.0})
    done = average(path, [10, 20])
    assert not any(entry.abandoned for entry in Run(path).ls())
    assert Run(path).newest().step == 30
    with Checkpointer(path, keep=KeepLast(1)) as run:
        live = state(0.0)
        assert run.resume(live) == 30
        run.save(31, live, weights_only=True).result()
        run.save(40, live).result()
    assert [(e.step, e.name == done.name) for e in Run(path).ls()] == [(20, True), (31, False), (40, False)]
    assert call("prune", path, "--keep-last", "1").exit_code == 0
    assert done.name in [entry.name for entry in Run(path).ls()]
    assert average(path, [done.name, 40]).name == "average-step-00000040"


def test_a_run_of_weights_alone_goes_on_where_it_was(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        for step in (10, 20):
            run.save(step, state(step), weights_only=True).result()
    average(tmp_path / "run", last=2)
    assert Run(tmp_path / "run").newest().name == "weights-step-00000020"
    with Checkpointer(tmp_path / "run") as run:
        run.save(30, state(30), weights_only=True).result()


def test_averaging_twice_gives_two_checkpoints_that_names_tell_apart(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", {10: 1.0, 20: 3.0})
    assert average(path, last=2).name == "average-step-00000020"
    again = average(path, last=2, decay=0.5)
    assert again.name == "average-step-00000020+2"
    assert call("annotate", path, again.name, "loss=0.5").exit_code == 0
    assert Run(path).best("loss").name == again.name
    assert call("pin", path, again.name).exit_code == 0
    assert [entry.name for entry in Run(path).ls() if entry.pinned] == [again.name]


@pytest.mark.parametrize(
    "files", [Safetensors(codec="planes"), Safetensors(codec="planes", delta=Delta(chain=2)), Zarr(codec="zstd")]
)
def test_whatever_they_are_stored_as_checkpoints_can_be_averaged(files: Any, tmp_path: Path) -> None:
    path = saved(tmp_path / "run", {10: 1.0, 20: 2.0, 30: 6.0}, files=files)
    found = loaded(path, average(path, last=3).name)
    torch.testing.assert_close(found["model.w"], torch.arange(5000) * 3.0)


def test_more_checkpoints_than_are_read_at_once_can_be_averaged(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", {step: float(step) for step in range(1, 12)})
    found = loaded(path, average(path, last=11).name)
    torch.testing.assert_close(found["model.w"], torch.arange(5000) * 6.0, rtol=1e-6, atol=0)
    assert found["model.low"].unique().tolist() == [6.0]


def test_windows_end_in_the_middle_of_tensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(writing, "WINDOW_BYTES", 1)  # one extent each
    with Checkpointer(tmp_path / "run") as run:
        models = [torch.nn.Linear(2000, 3000, dtype=dtype) for dtype in (torch.float32, torch.float64)]
        big = torch.nn.ModuleList(models)
        for step in (1, 2):
            with torch.no_grad():
                for number, parameter in enumerate(big.parameters()):
                    parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) * step + number)
            run.save(step, {"model": big}).result()
    found = loaded(tmp_path / "run", average(tmp_path / "run", last=2).name)
    for number, (name, parameter) in enumerate(big.named_parameters()):
        expected = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape) * 1.5 + number
        torch.testing.assert_close(found[f"model.{name}"], expected.to(parameter.dtype), rtol=1e-7, atol=0)


FLOATS = [dtype for dtype in CODES if accumulator_of(dtype) is not None]


@examples(200)
@given(st.data())
def test_a_blend_is_the_weighted_mean_and_equal_values_stay(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(FLOATS))
    count, size = data.draw(st.integers(2, 5)), data.draw(st.integers(0, 9))
    number = st.floats(-100, 100) | st.sampled_from([0.0, -0.0, INF, -INF, NAN, 3e38, -3e38])
    rows = [torch.tensor(data.draw(st.lists(number, min_size=size, max_size=size))).to(dtype) for _ in range(count)]
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=count, max_size=count))
    wide = accumulator_of(dtype)
    assert wide is not None
    total = torch.empty(size, dtype=wide)
    cut = data.draw(st.integers(1, count))  # some come at once
    blend, fractions = Blend(torch.empty(size, dtype=dtype), total), fractions_of(weights)
    blend.add(rows[:cut], fractions[:cut])
    blend.add(rows[cut:], fractions[cut:])
    parts = torch.view_as_real if dtype.is_complex else (lambda one: one)
    exact = sum(
        torch.where((p := parts(row).double()) == 0, 0.0, p * w) for row, w in zip(rows, weights, strict=True)
    ) / sum(weights)
    found = parts(total).double()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5 * 100, equal_nan=True)
    same = torch.empty(size, dtype=dtype)
    Blend(same, None).add([rows[0]] * count, fractions)
    assert torch.equal(parts(same.to(wide)).nan_to_num(7), parts(rows[0].to(wide)).nan_to_num(7))


@given(st.integers(2, 20), st.floats(0.01, 0.99))
def test_the_weights_of_an_average_that_moves_are_those_of_its_definition(count: int, decay: float) -> None:
    weights = ema_weights(count, decay)
    values = [float(i * i) for i in range(count)]
    moving = values[0]
    for value in values[1:]:
        moving = decay * moving + (1 - decay) * value
    assert sum(weights) == pytest.approx(1)
    assert sum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(moving)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"steps": [10]}, InvalidOption, "two or more"),
        ({}, InvalidOption, "two or more steps, or last=K"),
        ({"steps": [10, 20], "last": 2}, InvalidOption, "not both"),
        ({"steps": [10, 20, 10]}, InvalidOption, "given twice"),
        ({"steps": "10"}, InvalidOption, "a list of steps"),
        ({"last": 1}, InvalidOption, "last must be"),
        ({"last": 4}, CheckpointNotFound, r"there are 3 to average \(steps: 10, 20, 30\)"),
        ({"steps": [10, 11]}, CheckpointNotFound, "no checkpoint of step 11"),
        ({"steps": [10, 20], "weights": [1]}, InvalidOption, "1 weights for 2"),
        ({"steps": [10, 20], "weights": [1, 0]}, InvalidOption, "numbers > 0"),
        ({"steps": [10, 20], "weights": [1, NAN]}, InvalidOption, "numbers > 0"),
        ({"last": 2, "decay": 1.0}, InvalidOption, "between 0 and 1"),
        ({"last": 2, "decay": 0.5, "weights": [1, 2]}, InvalidOption, "not both"),
        ({"last": 2, "components": ["ema"]}, StateMismatch, "no component 'ema', but: model, optimizer, meta"),
        ({"last": 2, "components": ["meta"]}, InvalidOption, "has no module to average"),
        ({"last": 2, "name": "latest"}, InvalidOption, "always means"),
    ],
)
def test_what_cannot_be_averaged_is_refused(options: Any, error: type[Exception], told: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "run", {10: 1.0, 20: 2.0, 30: 3.0})
    with pytest.raises(error, match=told):
        average(path, **options)
    assert len(Run(path).ls()) == 3


def test_checkpoints_of_other_models_are_refused_by_name(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        for step, model in enumerate((torch.nn.Linear(2, 3), torch.nn.Linear(2, 4), torch.nn.Linear(2, 3).double())):
            run.save(step, {"model": model}).result()
    with pytest.raises(StateMismatch, match=r"model\.bias is F32\[4\], and F64\[3\] in the newest"):
        average(tmp_path / "run", [1, 2])
    with pytest.raises(StateMismatch, match=r"step-00000000: model\.weight is F32\[3, 2\], and F64\[3, 2\]"):
        average(tmp_path / "run", [0, 2])


def test_damage_is_found_and_nothing_is_published(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", {10: 1.0, 20: 2.0})
    shard = path / "step-00000010" / "model-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match="do not match their digest"):
        average(path, [10, 20])
    assert len(Run(path).ls()) == 2
    assert not [name for name in path.iterdir() if name.name.startswith(".tmp")]


def test_beside_a_live_writer_the_result_goes_to_another_run(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        for step in (1, 2):
            run.save(step, state(step)).result()
        result = CliRunner().invoke(app, ["average", str(run.path), "1", "2"])
        assert (result.exit_code, "--to" in result.stderr) == (4, True), result.output
        with pytest.raises(RunLocked, match="give the result another directory"):
            average(run.path, last=2)
        done = average(run.path, last=2, to=tmp_path / "other")
    assert done.path == f"{tmp_path}/other/{done.name}"
    assert Run(tmp_path / "other").newest().name == done.name
    assert loaded(tmp_path / "other", done.name)["model.low"].unique().tolist() == [1.5]


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", {10: 1.0, 20: 2.0})
    result = call("average", path, "10", "20", "--weights", "1,3", "--name", "soup", "--json")
    row = json.loads(result.stdout)
    assert (row["step"], row["weights"]) == (20, [[10, 0.25], [20, 0.75]])
    result = call("average", path, "--last", "2", "--ema", "0.9", "--component", "model")
    assert "of steps 10 (0.9), 20 (0.1)" in result.stdout
    assert call("average", path, "10", "20", "--weights", "1;2").exit_code == 2
    assert call("average", path, "10", "latest").exit_code == 2
    assert call("average", tmp_path / "none", "--last", "2").exit_code == 3


@pytest.mark.parametrize("dies", [False, True], ids=["error", "death"])
def test_wherever_it_is_struck_there_is_the_whole_average_or_none(
    dies: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = saved(tmp_path / "original", {10: 1.0, 20: 2.0})

    def make(name: Path) -> Path:
        return Path(shutil.copytree(original, tmp_path / name))

    def act(store: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("asyncckpt.derive.averaging.open_store", lambda _: store)
            done = average(store.path, last=2)
        assert Run(store.path).verify(done.name) == []

    assert strike_everywhere(make, act, dies=dies) > 10
    for path in itertools.chain(tmp_path.glob("*-True"), tmp_path.glob("*-False")):
        with Checkpointer(path) as run:  # the next writer tidies up
            assert run.resume(state(0.0)) == 20
        assert not list(path.glob(".tmp-*"))
