"""GGUF in and out: logits are equal through Transformers' own reader, which knows how llama and gpt2 are ordered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from support.foreign import Holder, bits, exported, imported, module_bits, saved, tensor

from asyncckpt import CheckpointDamaged, InvalidOption, UnsupportedValue
from asyncckpt.convert.exporting import ExportOptions
from asyncckpt.convert.gguf_names import Architecture
from asyncckpt.convert.selection import Selection

TOKENS = torch.arange(16).reshape(2, 8)


def _llama(tied: bool = False, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
        **more,
    )
    return transformers.LlamaForCausalLM(config).eval()


def _gpt2() -> Any:
    torch.manual_seed(0)  # Transformers takes neither the vocabulary's size nor that of positions from the file
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2)).eval()


MODELS = {"llama": _llama, "tied": lambda: _llama(tied=True), "gpt2": _gpt2}


def _run(model: Any, path: Path) -> Any:
    model.config.architectures = [type(model).__name__]
    return saved(path, {"model": model}, assets=[model.config])


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def _load(folder: Path, name: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_equal_through_transformers_and_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    run = _run(model, tmp_path / "run")
    exported(run, tmp_path / "out.gguf")
    assert torch.equal(_logits(_load(tmp_path, "out.gguf")), _logits(model))
    back, done = imported(tmp_path / "out.gguf", tmp_path / "back")
    assert module_bits(back) == bits(dict(model.state_dict()))
    exported(back, tmp_path / "hf", format="hf")
    assert torch.equal(_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")), _logits(model))
    assert any("Transformers' names" in note for note in done.notes)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_kinds_round_matrices_and_leave_vectors(name: str, kind: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    run = _run(model, tmp_path / "run")
    exported(run, tmp_path / "out.gguf", options=ExportOptions(quantized=kind))
    back, _ = imported(tmp_path / "out.gguf", tmp_path / "back")
    dtype = torch.float16 if kind == "F16" else torch.bfloat16
    wanted = {k: v.to(dtype) if v.dim() > 1 else v for k, v in model.state_dict().items()}
    assert module_bits(back) == bits(wanted)
    types = {one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert types == {kind, "F32"}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_q8_0_is_within_the_bound_of_the_format(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    run = _run(model, tmp_path / "run")
    exported(run, tmp_path / "out.gguf", options=ExportOptions(quantized="Q8_0"))
    loaded = _load(tmp_path, "out.gguf").state_dict()
    back, _ = imported(tmp_path / "out.gguf", tmp_path / "back")
    found = back.load(component="model")
    for key, value in model.state_dict().items():
        assert torch.equal(found[key], loaded[key]), key
        if value.dim() < 2:
            assert torch.equal(found[key], value)
            continue
        turned = name == "gpt2" and (".c_" in key)
        blocks = (value.t() if turned else value).reshape(-1, 32)
        off = ((found[key].t() if turned else found[key]).reshape(-1, 32) - blocks).abs().amax(1)
        step = blocks.abs().amax(1) / 127
        assert bool((off <= step * (0.5 + 127 * 2**-11) + 1e-7).all()), (
            key
        )  # half a step, and the scale is a half float


def test_names_are_those_of_the_library(tmp_path: Path) -> None:
    for name, model in (("llama", _llama()), ("gpt2", _gpt2())):
        kind = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[name]
        theirs = gguf.get_tensor_name_map(kind, 2)
        mine = Architecture(name, 4, 2)
        for key in model.state_dict():
            stem, _, suffix = key.rpartition(".")
            assert mine.to_gguf(key) == f"{theirs.get_name(stem)}.{suffix}"
            assert mine.to_hf(mine.to_gguf(key) or "") == key


def test_a_model_that_would_become_another_is_refused(tmp_path: Path) -> None:
    scaled = _llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    run = _run(scaled, tmp_path / "run")
    with pytest.raises(UnsupportedValue, match=r"scaled rotations.*--drop"):
        exported(run, tmp_path / "out.gguf")
    exported(run, tmp_path / "out.gguf", selection=Selection(drop=["architecture"]))
    names = {one.name for one in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert "model.layers.0.self_attn.q_proj.weight" in names


def test_any_tensors_go_without_a_config_within_the_limits_of_the_format(tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64)
    given = {f"t{n}.{k}": tensor(d, s, n) for n, d in enumerate(dtypes) for k, s in enumerate([(4, 5), (2, 3, 4, 5)])}
    run = saved(tmp_path / "run", {"model": Holder(given)})
    exported(run, tmp_path / "out.gguf")
    back, _ = imported(tmp_path / "out.gguf", tmp_path / "back")
    assert module_bits(back) == bits(given)
    for one in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        assert one.data.tobytes() == bits(given[one.name])[2]
    for name, value, words in (
        ("x" * 64, torch.ones(2), "63 bytes"),
        ("many", torch.ones(1, 1, 1, 1, 2), "5 dimensions"),
        ("none", torch.tensor(1.0), "without dimensions"),
        ("double", torch.ones(2, dtype=torch.float64), "F64"),
    ):
        odd = saved(tmp_path / name[:6], {"model": Holder({name: value, "w": torch.ones(2)})})
        with pytest.raises(UnsupportedValue, match=words):
            exported(odd, tmp_path / "odd.gguf")
        exported(odd, tmp_path / f"{name[:6]}.gguf", selection=Selection(drop=[name]))
    with pytest.raises(InvalidOption, match=r"kinds are"):
        exported(run, tmp_path / "odd.gguf", options=ExportOptions(quantized="Q4_K"))


def test_the_vocabulary_of_byte_pairs_goes_along(tmp_path: Path) -> None:
    model = _llama()
    body = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}, "added_tokens": []}
    files = {"config.json": model.config.to_json_string().encode(), "tokenizer.json": json.dumps(body).encode()}
    run = saved(tmp_path / "run", {"model": model}, assets=files)
    exported(run, tmp_path / "out.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[:4] == ["a", "b", "ab", "[PAD3]"]
    assert fields["tokenizer.ggml.merges"].contents() == ["a b"]
    assert fields["asyncckpt.step"].contents() == "1"


def test_a_cut_or_forged_file_is_damage(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", {"model": Holder({"w": torch.ones(64, 64)})})
    exported(run, tmp_path / "out.gguf")
    whole = (tmp_path / "out.gguf").read_bytes()
    for number, data in enumerate((whole[:-100], whole[:100], b"GGUF" + bytes(50), np.random.bytes(200))):
        (tmp_path / f"{number}.gguf").write_bytes(data)
        with pytest.raises(CheckpointDamaged):
            imported(tmp_path / f"{number}.gguf", tmp_path / "no")
