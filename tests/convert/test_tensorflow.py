"""Checkpoints of TensorFlow in and out, by TensorFlow's own reader. It has an environment of its own, because it is
large: ``make test-tensorflow``."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.foreign import DTYPES, Holder, bits, exported, imported, module_bits, origin_of, saved, tensor

from asyncckpt import CheckpointDamaged, MissingExtra, UnsupportedValue
from asyncckpt.convert.exporting import ExportOptions
from asyncckpt.convert.formats import import_checkpoint
from asyncckpt.convert.selection import Selection
from asyncckpt.convert.tensorflow_files import tensorflow_dtype

THERE = find_spec("tensorflow") is not None
needs_tensorflow = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not THERE, reason="TensorFlow has an environment of its own: make test-tensorflow"),
]


@pytest.mark.skipif(THERE, reason="it is installed")
def test_without_tensorflow_the_error_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt.index").write_bytes(b"")
    with pytest.raises(MissingExtra, match=r"asyncckpt\[tensorflow\]"):
        import_checkpoint(tmp_path / "model.ckpt", tmp_path / "run", 1)


class TestTensorFlow:
    pytestmark = needs_tensorflow

    def _lacking(self) -> set[torch.dtype]:
        import tensorflow as tf

        return {d for d in DTYPES if tensorflow_dtype(tf, str(d).removeprefix("torch.")) is None}

    @pytest.mark.parametrize("shard_bytes", [None, 100])
    def test_all_dtypes_and_shapes_go_out_and_in_bit_for_bit(self, tmp_path: Path, shard_bytes: int | None) -> None:
        import tensorflow as tf

        shapes: tuple[tuple[int, ...], ...] = ((), (0,), (3, 4), (2, 3, 4))
        dtypes = [dtype for dtype in DTYPES if dtype not in self._lacking()]
        assert len(dtypes) >= 17, f"TensorFlow {tf.__version__} lacks {self._lacking()}"
        given = {f"v/{d}.{k}": tensor(d, s, k) for d in dtypes for k, s in enumerate(shapes)}
        given["tied"] = given["v/torch.float32.2"]
        run = saved(tmp_path / "run", {"model": Holder(given)})
        exported(run, tmp_path / "out", format="tensorflow", options=ExportOptions(shard_bytes=shard_bytes))
        reader = tf.train.load_checkpoint(str(tmp_path / "out"))
        for name, value in given.items():
            assert reader.get_tensor(name).tobytes() == bits(value)[2], name
            assert tuple(reader.get_variable_to_shape_map()[name]) == tuple(value.shape)
        back, done = imported(tmp_path / "out" / "model.ckpt", tmp_path / "back")
        assert module_bits(back) == bits(given)
        assert "model.ckpt.index" in dict(done.source["files"])  # type: ignore[arg-type, call-overload]

    def test_both_ways_say_what_they_were_made_of(self, tmp_path: Path) -> None:
        run = saved(tmp_path / "run", {"model": Holder({"w": torch.ones(3)})})
        done = exported(run, tmp_path / "out", format="tensorflow")
        assert json.loads((tmp_path / "out" / "asyncckpt.json").read_bytes()) == done.source == origin_of(run)
        _, back = imported(tmp_path / "out" / "model.ckpt", tmp_path / "back")
        assert back.source["format"] == "tensorflow"

    def test_a_checkpoint_of_tensorflows_own_comes_in(self, tmp_path: Path) -> None:
        import tensorflow as tf

        made: Any = tf.train.Checkpoint(w=tf.Variable([[1.0, 2.0]]), n=tf.Variable(3))
        prefix = made.save(str(tmp_path / "own.ckpt"))
        run, _ = imported(Path(prefix), tmp_path / "run")
        found = run.load(component="model")
        assert found["w/.ATTRIBUTES/VARIABLE_VALUE"].tolist() == [[1.0, 2.0]]
        text: Any = tf.train.Checkpoint(s=tf.Variable("words"))
        prefix = text.save(str(tmp_path / "text.ckpt"))
        with pytest.raises(UnsupportedValue, match=r"a variable of string"):
            imported(Path(prefix), tmp_path / "no")
        imported(Path(prefix), tmp_path / "yes", selection=Selection(drop=["*"]))

    def test_a_flipped_bit_is_found_by_tensorflows_checksum(self, tmp_path: Path) -> None:
        run = saved(tmp_path / "run", {"model": Holder({"w": torch.ones(1000)})})
        exported(run, tmp_path / "out", format="tensorflow")
        file = next((tmp_path / "out").glob("model.ckpt.data-*"))
        data = bytearray(file.read_bytes())
        data[500] ^= 1
        file.write_bytes(data)
        with pytest.raises(CheckpointDamaged, match=r"'w' cannot be read"):
            imported(tmp_path / "out", tmp_path / "back")
