"""Every conversion records what it was made of and that one's digest, where the format's own reader finds or ignores
it."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import onnx
import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
import zarr
from safetensors import safe_open
from support import tiny_transformers
from support.foreign import Holder, exported, imported, origin_of, saved

from asyncckpt import CheckpointDamaged, Run
from asyncckpt.convert.formats import READERS, WRITERS, import_checkpoint
from asyncckpt.convert.source import Source
from asyncckpt.convert.trainer_folder import export_for_trainer
from asyncckpt.integrations.peft import Adapters

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

#: These have tests of their own that say it, because they need an environment, or files, of their own.
ELSEWHERE = {"tensorflow": "test_tensorflow.py", "deepspeed": "test_deepspeed_zero.py"}


def _weights(folder: Path) -> Run:
    return saved(folder, {"model": Holder({"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)})}, 7)


def _llama(folder: Path) -> Run:
    model = tiny_transformers.model()
    return saved(folder, {"model": model}, 7, assets=[model.config])


def _adapter(folder: Path) -> Run:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    return saved(folder, {"adapter": Adapters(peft.get_peft_model(tiny_transformers.model(), config))}, 7)


def _of_safetensors(path: Path) -> Any:
    with safe_open(path, "pt") as file:
        return file.metadata()


def _of_torch(path: Path) -> Any:
    assert torch.equal(torch.load(path, weights_only=True)["w"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(torch.load(path, weights_only=True, mmap=True)["b"], torch.ones(3))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        (name,) = (name for name in archive.namelist() if name.endswith("/asyncckpt.json"))
        return json.loads(archive.read(name))


def _of_hf(path: Path) -> Any:
    transformers.AutoModelForCausalLM.from_pretrained(path)
    return _of_safetensors(path / "model.safetensors")


def _of_dcp(path: Path) -> Any:
    state = {"model": {"w": torch.zeros(2, 3)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=path, no_dist=True)
    assert torch.equal(state["model"]["w"], torch.arange(6.0).reshape(2, 3))
    return json.loads((path / "asyncckpt.json").read_bytes())


def _of_gguf(path: Path) -> Any:
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items()}


def _of_onnx(path: Path) -> Any:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


#: By format: what makes a run to export, what to call the result, and what reads the record as the format has it.
OUT: dict[str, tuple[Callable[[Path], Run], str, Callable[[Path], Any]]] = {
    "safetensors": (_weights, "out.safetensors", _of_safetensors),
    "safetensors-shards": (_weights, "out", lambda path: _of_safetensors(path / "model.safetensors")),
    "torch": (_weights, "out.pt", _of_torch),
    "hf": (_llama, "out", _of_hf),
    "peft": (_adapter, "out", lambda path: _of_safetensors(path / "adapter_model.safetensors")),
    "dcp": (_weights, "out", _of_dcp),
    "gguf": (_weights, "out.gguf", _of_gguf),
    "onnx": (_weights, "out.onnx", _of_onnx),
    "zarr": (_weights, "out", lambda path: dict(zarr.open_group(path, mode="r").attrs)),
}


def test_no_format_is_left_out() -> None:
    assert OUT.keys() | ELSEWHERE.keys() == WRITERS.keys() | ELSEWHERE.keys()
    assert {"torch" if name == "dcp" else name for name in OUT} | ELSEWHERE.keys() >= READERS.keys()


@pytest.mark.parametrize("format", OUT)
def test_what_goes_out_and_comes_in_says_what_it_was_made_of(format: str, tmp_path: Path) -> None:
    make, name, read = OUT[format]
    run, out = make(tmp_path / "run"), tmp_path / name
    done = exported(run, out, format=format)
    wanted = origin_of(run)
    assert wanted["asyncckpt.step"] == "7"
    assert done.source == wanted
    assert read(out).items() >= wanted.items()
    _, came = imported(out, tmp_path / "back")
    assert came.source["format"] == format.removesuffix("-shards")


def test_a_folder_for_the_trainer_says_what_it_was_made_of(tmp_path: Path) -> None:
    trainer = tiny_transformers.trainer(str(tmp_path / "ours"), max_steps=3)
    trainer.train()
    run = Run(tmp_path / "ours")
    with run.open() as checkpoint:
        export_for_trainer(checkpoint, tmp_path / "checkpoint-3")
    assert json.loads((tmp_path / "checkpoint-3" / "asyncckpt.json").read_bytes()) == origin_of(run)


@pytest.mark.parametrize("format", ["dcp", "zarr"])
@pytest.mark.parametrize("change", ["written", "replaced", "gone"])
def test_a_file_that_changes_while_something_else_reads_it_is_refused(
    format: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(_weights(tmp_path / "run"), tmp_path / "out", format=format)
    victim = max(
        (path for path in (tmp_path / "out").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    honest = Source.check_unchanged

    def late(self: Source) -> None:
        data = victim.read_bytes()
        if change != "written":
            victim.unlink()
        if change != "gone":
            victim.write_bytes(data + b"more")
        honest(self)

    monkeypatch.setattr(Source, "check_unchanged", late)
    with pytest.raises(CheckpointDamaged, match=r"changed while it was read|is gone since it was read"):
        import_checkpoint(tmp_path / "out", tmp_path / "back", 1)
    assert Run(tmp_path / "back").ls() == []
