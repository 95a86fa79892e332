"""A checkpoint's directory opens as it lies, with the loaders of the libraries that people train with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncckpt import Checkpointer, Run, Safetensors

os.environ["HF_HUB_OFFLINE"] = "1"

pytestmark = pytest.mark.filterwarnings("ignore")  # these libraries' own, which come and go with their versions


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _import(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def _equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    here, there = a.state_dict(), b.state_dict()
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


def _llama(*, tied: bool) -> Any:
    transformers = _import("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def _tokenizer() -> Any:
    transformers = _import("transformers")
    tokenizers = _import("tokenizers")
    words = tokenizers.models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def _saved(path: Path, model: torch.nn.Module, assets: Any, name: str = "model", **options: Any) -> str:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with Checkpointer(path, assets=assets, **options) as run:
        report = run.save(1, {name: model, "optimizer": optimizer, "extra": {"x": torch.ones(3)}}).result()
    assert Run(path).verify(1) == []
    assert Run(path).ls()[0].extra == ()
    return report.path


@pytest.mark.parametrize(("tied", "name", "shard_bytes"), [(True, "model", 4096), (False, "policy", 4 << 30)])
def test_transformers_opens_it(tied: bool, name: str, shard_bytes: int, tmp_path: Path) -> None:
    transformers = _import("transformers")
    model = _llama(tied=tied)
    assets = {"config": model.config, "generation": model.generation_config, "tokenizer": _tokenizer()}
    where = _saved(tmp_path, model, assets, name, files=Safetensors(shard_bytes=shard_bytes))
    found = transformers.AutoModelForCausalLM.from_pretrained(where)
    assert type(found) is type(model)
    assert _equal(found, model)
    assert found.generation_config.eos_token_id == 2
    assert transformers.AutoTokenizer.from_pretrained(where)("hello world")["input_ids"] == [1, 2]
    assert set(Run(tmp_path).assets(1)) >= {"config.json", "generation_config.json", "tokenizer.json"}


def test_a_model_is_no_asset(tmp_path: Path) -> None:
    from asyncckpt import InvalidOption

    with pytest.raises(InvalidOption, match=r"assets=\[model\.config, tokenizer\]"):
        Checkpointer(tmp_path, assets=[_llama(tied=True)])


def test_accelerate_opens_it(tmp_path: Path) -> None:
    accelerate = _import("accelerate")
    model = _llama(tied=True)
    where = _saved(tmp_path, model, [], files=Safetensors(shard_bytes=4096))
    with accelerate.init_empty_weights():
        found = type(model)(model.config)
    found.tie_weights()
    found = accelerate.load_checkpoint_and_dispatch(found, where, device_map={"": "cpu"})
    assert _equal(found, model)


def test_diffusers_opens_it(tmp_path: Path) -> None:
    diffusers = _import("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        layers_per_block=1,
    )
    assets = {"config.json": model.to_json_string().encode(), "scheduler/": diffusers.DDPMScheduler(beta_end=0.5)}
    where = _saved(tmp_path, model, assets, "unet", files=Safetensors(shard_bytes=4096))
    assert _equal(diffusers.UNet2DModel.from_pretrained(where), model)
    assert diffusers.DDPMScheduler.from_pretrained(where, subfolder="scheduler").config.beta_end == 0.5


def test_an_adapters_config_is_an_asset(tmp_path: Path) -> None:
    peft = _import("peft")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"])
    model = peft.get_peft_model(_llama(tied=False), config)
    where = _saved(tmp_path, model, [model.peft_config["default"]])
    assert peft.PeftConfig.from_pretrained(where).r == 3
