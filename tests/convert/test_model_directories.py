"""Model directories of Transformers and adapter directories of PEFT, in and out, by their own readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from support import tiny_transformers
from support.foreign import Holder, bits, exported, imported, module_bits, saved

from asyncckpt import InvalidOption, UnsupportedValue
from asyncckpt.convert.exporting import ExportOptions
from asyncckpt.convert.selection import Selection
from asyncckpt.integrations.peft import Adapters

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TOKENS = torch.arange(16).reshape(2, 8)


def _gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def _llama(tied: bool = True) -> Any:
    return tiny_transformers.model() if tied else _untied()


def _untied() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


MODELS = {"gpt2": _gpt2, "llama": _llama, "untied": _untied}


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(TOKENS).logits
    return logits


@pytest.mark.parametrize("shards", [None, 8_000])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_directory_goes_in_and_out_with_equal_logits(name: str, shards: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "in", max_shard_size="8KB" if shards else "5GB")
    run, done = imported(tmp_path / "in", tmp_path / "run")
    exported(run, tmp_path / "out", format="hf", options=ExportOptions(shard_bytes=shards))
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == bool(shards)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(_logits(back), _logits(model))
    direct = transformers.AutoModelForCausalLM.from_pretrained(done.path)  # a checkpoint is such a directory itself
    assert torch.equal(_logits(direct), _logits(model))
    live = type(model)(model.config)
    run.restore({"model": live}, 1)  # with all names of tied weights: strict
    assert torch.equal(_logits(live), _logits(model))


def test_what_training_saved_is_exported_with_its_config_in_the_dtype_asked_for(tmp_path: Path) -> None:
    model = _llama()
    run = saved(tmp_path / "run", {"model": model}, assets=[model.config, model.generation_config])
    exported(run, tmp_path / "out", format="hf", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert back.dtype == torch.bfloat16
    assert bits(back.state_dict()) == bits(model.to(torch.bfloat16).state_dict())


def test_names_that_the_model_does_not_have_are_refused_with_the_rename_that_would_do(tmp_path: Path) -> None:
    model = _llama()
    weights = {f"wrapped.{name}": value.clone() for name, value in model.state_dict().items()}
    run = saved(tmp_path / "run", {"model": Holder(weights)}, assets=[model.config])
    with pytest.raises(InvalidOption, match=r"missing: model.embed_tokens.weight.*--rename wrapped="):
        exported(run, tmp_path / "out", format="hf")
    assert not (tmp_path / "out").exists()
    exported(run, tmp_path / "out", format="hf", selection=Selection(rename={"wrapped": ""}))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(_logits(back), _logits(model))


def test_without_a_config_there_is_no_model_directory(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", {"model": _llama()})
    with pytest.raises(InvalidOption, match=r"no config.json.*assets="):
        exported(run, tmp_path / "out", format="hf")


def test_pickles_of_a_trainer_beside_a_model_are_refused_or_dropped(tmp_path: Path) -> None:
    model = _llama()
    model.save_pretrained(tmp_path / "in")
    torch.save({"x": 1}, tmp_path / "in" / "training_args.bin")
    (tmp_path / "in" / "notes.txt").write_text("mine")
    with pytest.raises(UnsupportedValue, match=r"training_args.bin"):
        imported(tmp_path / "in", tmp_path / "run")
    run, done = imported(tmp_path / "in", tmp_path / "run", selection=Selection(drop=["training_args.bin"]))
    assert list(done.skipped) == ["training_args.bin"]
    assert run.assets(1)["notes.txt"] == b"mine"


def test_a_directory_of_old_weights_is_read_without_executing_anything(tmp_path: Path) -> None:
    model = _untied()
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    names = list(model.state_dict())
    half = len(names) // 2
    for number, part in enumerate((names[:half], names[half:])):
        torch.save({n: model.state_dict()[n] for n in part}, tmp_path / "in" / f"pytorch_model-{number}.bin")
    places = {n: f"pytorch_model-{int(k >= half)}.bin" for k, n in enumerate(names)}
    (tmp_path / "in" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    run, _ = imported(tmp_path / "in", tmp_path / "run")
    assert module_bits(run) == bits(dict(model.state_dict()))


def _with_adapter() -> tuple[Any, Any]:
    torch.manual_seed(0)
    base = _untied()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return base, peft.get_peft_model(base, config)


def test_an_adapter_directory_goes_in_and_out_and_restores_into_live_adapters(tmp_path: Path) -> None:
    _, model = _with_adapter()
    wanted = _logits(model)
    model.save_pretrained(tmp_path / "in")
    run, done = imported(tmp_path / "in", tmp_path / "run")
    assert dict(done.components) == {"adapter": "module"}
    exported(run, tmp_path / "out", format="peft")
    for folder in (tmp_path / "out", Path(done.path)):
        torch.manual_seed(0)
        back = peft.PeftModel.from_pretrained(_untied(), folder)
        assert torch.equal(_logits(back), wanted)
    _, live = _with_adapter()
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    run.restore({"adapter": Adapters(live)}, 1)
    assert torch.equal(_logits(live), wanted)


def test_an_adapter_that_training_saved_is_exported_beside_its_base(tmp_path: Path) -> None:
    base, model = _with_adapter()
    wanted = _logits(model)
    run = saved(tmp_path / "run", {"adapter": Adapters(model), "head": torch.nn.Linear(2, 2)})
    exported(run, tmp_path / "out", format="peft")
    torch.manual_seed(0)
    back = peft.PeftModel.from_pretrained(_untied(), tmp_path / "out")
    assert torch.equal(_logits(back), wanted)
    assert base is not None
    with pytest.raises(InvalidOption, match=r"adapter_config.json"):
        exported(run, tmp_path / "no", format="peft", what="head")
