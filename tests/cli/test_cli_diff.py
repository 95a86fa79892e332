"""``asyncckpt diff``: numbers that can be trusted, for every dtype, with NaNs, and across batches."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from asyncckpt import Checkpointer, Run
from asyncckpt.cli.app import app
from asyncckpt.state.dtypes import CODES

compare_verb: Any = importlib.import_module("asyncckpt.cli.diff")
NAN, INF = float("nan"), float("inf")


def change(a: list[float], b: list[float]) -> Any:
    return compare_verb.change_of(torch.tensor(a), torch.tensor(b))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, NAN], [1.0, NAN], None),
        ([1.0, -4.0], [1.5, -4.0], {"max_abs": 0.5, "relative": 0.125, "not_finite": 0}),
        ([NAN, 2.0], [NAN, 3.0], {"max_abs": 1.0, "relative": 0.5, "not_finite": 0}),
        ([INF, 2.0], [INF, 3.0], {"max_abs": 1.0, "relative": 0.5, "not_finite": 0}),
        ([2.0, 2.0], [NAN, 3.0], {"max_abs": 1.0, "relative": 0.5, "not_finite": 1}),
        ([INF, 2.0], [-INF, 2.0], {"max_abs": 0.0, "relative": 0.0, "not_finite": 1}),
        ([NAN], [1.0], {"max_abs": None, "relative": None, "not_finite": 1}),
        ([0.0], [1.0], {"max_abs": 1.0, "relative": None, "not_finite": 0}),
        ([0.0], [-0.0], {"max_abs": 0.0, "relative": 0.0, "not_finite": 0}),
    ],
)
def test_a_change_is_neither_hidden_by_nor_invented_from_nan(a: list[float], b: list[float], expected: Any) -> None:
    assert change(a, b) == expected


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_no_dtype_is_beyond_comparison(dtype: torch.dtype) -> None:
    one = torch.tensor([0, 1, 1]).to(dtype)
    two = torch.tensor([0, 1, 0]).to(dtype)
    assert compare_verb.change_of(one, two) == {"max_abs": 1.0, "relative": 1.0, "not_finite": 0}
    assert compare_verb.change_of(one, one.clone()) is None


def test_the_largest_change_is_found_in_whatever_chunk_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_verb, "_CHUNK", 4)
    a = torch.zeros(3, 5)
    for place in range(15):
        b = a.clone()
        b.view(-1)[place] = -7
        assert compare_verb.change_of(a, b)["max_abs"] == 7
        assert compare_verb.change_of(b, a)["relative"] == 1


def test_batches_change_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"model": model}).result()
        with torch.no_grad():
            model[1].weight += 1
        run.save(2, {"model": model}).result()
    reading = Run(tmp_path / "run")
    one, two = reading.open(1), reading.open(2)
    whole = compare_verb.compare(one, two)
    monkeypatch.setattr(compare_verb, "_BATCH_BYTES", 1)
    assert compare_verb.compare(one, two) == whole
    one.close()
    two.close()
    assert list(whole["changed"]) == ["model.1.weight"]
    assert whole["unchanged"] == 3


def test_plain_values_are_named_by_their_path_in_the_state(tmp_path: Path) -> None:
    before = {"hyper": {"betas": (0.9, 0.99), "order": OrderedDict(a=1, b=2), 3: "x", "same": NAN, "old": None}}
    after = {"hyper": {"betas": (0.9, 0.95), "order": OrderedDict(a=1, b=2.0), 3: "y", "same": NAN, "new": True}}
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, before).result()
        run.save(2, after).result()
    reading = Run(tmp_path / "run")
    one, two = reading.open(1), reading.open(2)
    found = compare_verb.compare(one, two)["plain"]
    one.close()
    two.close()
    assert found == {
        "hyper.betas.1": {"a": 0.99, "b": 0.95},
        "hyper.order.b": {"a": 2, "b": 2.0},
        "hyper.3": {"a": "x", "b": "y"},
        "hyper.old": {"a": None},
        "hyper.new": {"b": True},
    }
    shown = CliRunner().invoke(app, ["diff", str(tmp_path / "run"), "1", "2"])
    assert shown.exit_code == 1
    assert "hyper.betas.1: 0.99 → 0.95" in shown.stdout


def test_a_damaged_side_is_refused_not_compared(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"w": torch.ones(4)}).result()
        run.save(2, {"w": torch.zeros(4)}).result()
    shard = next((tmp_path / "run" / "step-00000002").glob("w-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = CliRunner().invoke(app, ["diff", str(tmp_path / "run"), "1", "2"])
    assert result.exit_code == 1
    assert "digest" in result.stderr
    assert result.stdout == ""
