"""Drift and cosine of ``diff``: of tensors and of layers, across runs, whatever the numbers are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples
from typer.testing import CliRunner

from asyncckpt import Checkpointer
from asyncckpt.cli import drift
from asyncckpt.cli.app import app
from asyncckpt.cli.drift import Moments, layer_of, moments_of

NAN, INF = math.nan, math.inf


def measured(a: Any, b: Any, dtype: torch.dtype = torch.float32) -> tuple[float | None, float | None]:
    found = moments_of(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype))
    assert found is not None
    return found.drift, found.cosine


@pytest.mark.parametrize(
    ("a", "b", "drift", "cosine"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0, 1.0),
        ([3.0, 4.0], [6.0, 8.0], 1.0, 1.0),
        ([3.0, 4.0], [-3.0, -4.0], 2.0, -1.0),
        ([3.0, 0.0], [0.0, 4.0], 5 / 3, 0.0),
        ([0.0, 0.0], [1.0, 0.0], None, None),
        ([1.0, 0.0], [0.0, 0.0], 1.0, None),
        ([3.0, 4.0, NAN, INF, 1.0], [6.0, 8.0, 1.0, INF, -INF], 1.0, 1.0),
        ([], [], None, None),
    ],
)
def test_drift_is_relative_length_and_cosine_is_direction(a: Any, b: Any, drift: Any, cosine: Any) -> None:
    assert measured(a, b) == (pytest.approx(drift), pytest.approx(cosine))


def test_whole_numbers_have_no_drift_and_complex_ones_do() -> None:
    assert moments_of(torch.tensor([1]), torch.tensor([2])) is None
    assert measured([3 + 4j], [6 + 8j], torch.complex64) == (pytest.approx(1.0), pytest.approx(1.0))


def test_numbers_too_large_to_square_have_none() -> None:
    assert measured([1e300], [2e300], torch.float64) == (None, None)


@examples(100)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40), st.integers(1, 7))
def test_chunks_and_parts_add_up(values: list[float], chunk: int) -> None:
    a, b = torch.tensor(values), torch.tensor(values[::-1])
    with pytest.MonkeyPatch.context() as patch:
        whole = moments_of(a, b)
        patch.setattr(drift, "_CHUNK", chunk)
        assert whole is not None
        cut = moments_of(a, b)
        parts = sum(
            (found for p, q in zip(a.split(3), b.split(3), strict=True) if (found := moments_of(p, q))), Moments()
        )
    for one in (cut, parts):
        assert one is not None
        assert one.first == pytest.approx(whole.first)
        assert one.product == pytest.approx(whole.product, abs=1e-6)
    if whole.first:
        assert whole.cosine == pytest.approx(torch.cosine_similarity(a.double(), b.double(), 0).item(), abs=1e-9)
        assert whole.drift == pytest.approx((torch.norm((b - a).double()) / torch.norm(a.double())).item())


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.h.3.attn.weight", "model.h.3"),
        ("model.h.3.experts.12.w", "model.h.3"),
        ("model.wte.weight", "model.wte"),
        ("model.weight", "model"),
        ("w", "w"),
    ],
)
def test_a_layer_is_named_up_to_its_number(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_two_runs_are_compared_by_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for name, factor in (("a", 1.0), ("b", 3.0)):
        with torch.no_grad():
            model[1].weight.mul_(factor)
        with Checkpointer(tmp_path / name) as run:
            run.save(1, {"model": model, "optimizer": torch.optim.SGD(model.parameters())}).result()
    arguments = ["diff", str(tmp_path / "a"), "1", "1", "--other", str(tmp_path / "b")]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["changed"]["model.1.weight"]["drift"] == pytest.approx(2.0)
    assert found["changed"]["model.1.weight"]["cosine"] == pytest.approx(1.0)
    assert found["layers"]["model.0"] == {
        "drift": 0.0, "cosine": pytest.approx(1.0), "tensors": 2, "changed": 0
    }  # fmt: skip
    assert found["layers"]["model.1"]["changed"] == 1
    assert 1.5 < found["layers"]["model.1"]["drift"] < 2.0  # the bias did not move
    result = CliRunner().invoke(app, [*arguments, "--layers"])
    assert result.exit_code == 1
    assert "cosine" in result.stdout
    assert "model.0 " in result.stdout
    assert "model.0 " not in CliRunner().invoke(app, arguments).stdout
