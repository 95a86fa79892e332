"""ONNX in and out: the checker and the runtime take what goes out, and initializers come in bit for bit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from support.examples import examples
from support.foreign import Holder, bits, exported, imported, module_bits, saved, tensors

from asyncckpt import CheckpointDamaged, UnsupportedValue
from asyncckpt.convert import onnx_out
from asyncckpt.convert.exporting import ExportOptions


def _session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@given(tensors())
@examples(40)
def test_initializers_go_out_and_in_bit_for_bit(given: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = saved(Path(folder, "run"), {"model": Holder(given)})
        exported(run, Path(folder, "out.onnx"))
        onnx.checker.check_model(str(Path(folder, "out.onnx")))
        back, _ = imported(Path(folder, "out.onnx"), Path(folder, "back"))
        assert module_bits(back) == bits(given)


def test_the_runtime_gives_the_values(tmp_path: Path) -> None:
    weights = {"w": torch.randn(3, 4), "n": torch.arange(3)}
    exported(saved(tmp_path / "run", {"model": Holder(weights)}), tmp_path / "out.onnx")
    session = _session(tmp_path / "out.onnx")
    found = dict(zip([one.name for one in session.get_outputs()], session.run(None, {}), strict=True))
    assert all(np.array_equal(found[name], value.numpy()) for name, value in weights.items())


@pytest.mark.parametrize("large", [False, True])
def test_a_modules_graph_with_the_checkpoints_weights_computes_what_torch_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr(onnx_out, "_EMBEDDED_BYTES", 1000)
        monkeypatch.setattr(onnx_out, "_EXTERNAL_BYTES", 100)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 3))
    run = saved(tmp_path / "run", {"model": model})
    given = torch.randn(5, 8)
    wanted = model(given).detach().numpy()
    for parameter in model.parameters():
        parameter.data.zero_()  # the graph must have the checkpoint's weights, not these
    exported(run, tmp_path / "out.onnx", options=ExportOptions(module=model, inputs=(given,)))
    onnx.checker.check_model(str(tmp_path / "out.onnx"))
    assert (tmp_path / "out.onnx.data").exists() == large
    session = _session(tmp_path / "out.onnx")
    found = session.run(None, {session.get_inputs()[0].name: given.numpy()})[0]
    assert np.abs(found - wanted).max() < 1e-5
    assert not any(bool(parameter.any()) for parameter in model.parameters()), "the module at hand was changed"
    back, done = imported(tmp_path / "out.onnx", tmp_path / "back")
    assert json.dumps(sorted(done.source["files"])) == json.dumps(  # type: ignore[arg-type]
        ["out.onnx", "out.onnx.data"] if large else ["out.onnx"]
    )
    values = {bits(value)[2] for value in back.load(component="model").values()}
    assert bits(run.load(component="model")["0.weight"])[2] in values


def test_large_initializers_lie_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_out, "_EMBEDDED_BYTES", 1000)
    monkeypatch.setattr(onnx_out, "_EXTERNAL_BYTES", 100)
    weights = {"w": torch.randn(30, 40), "b": torch.randn(3), "h": torch.randn(100).bfloat16()}
    run = saved(tmp_path / "run", {"model": Holder(weights)})
    exported(run, tmp_path / "out.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "out.onnx.data", "run"]
    onnx.checker.check_model(str(tmp_path / "out.onnx"))
    back, _ = imported(tmp_path / "out.onnx", tmp_path / "back")
    assert module_bits(back) == bits(weights)
    model = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    entry = next(one for one in model.graph.initializer if one.external_data).external_data[0]
    for name in ("../run/x", "/etc/passwd", "missing"):
        entry.value = name
        (tmp_path / "odd.onnx").write_bytes(model.SerializeToString())
        with pytest.raises((CheckpointDamaged, FileNotFoundError)):
            imported(tmp_path / "odd.onnx", tmp_path / "no")


def test_types_without_a_name_are_refused(tmp_path: Path) -> None:
    text = onnx.helper.make_tensor("words", onnx.TensorProto.STRING, [1], [b"x"])
    graph = onnx.helper.make_graph([], "g", [], [], initializer=[text])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "in.onnx")
    with pytest.raises(UnsupportedValue, match=r"words \(a tensor of STRING"):
        imported(tmp_path / "in.onnx", tmp_path / "run")
    (tmp_path / "no.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointDamaged):
        imported(tmp_path / "no.onnx", tmp_path / "run")
