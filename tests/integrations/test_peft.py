"""Adapters are saved without their base, PEFT opens a checkpoint of them as it lies, and they come back in place."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from asyncckpt import Checkpointer, InvalidOption, Run, StateMismatch
from asyncckpt.integrations.peft import Adapters

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

DIRECTORY = "step-00000001"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.socket.connect", _no_network)
        yield


def _no_network(*_: Any) -> None:
    raise OSError("nothing here asks the network")


class Tower(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))
        return out


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"target_modules": ["up", "down"], "r": 4, "init_lora_weights": False, **options})


def adapted(seed: int, *adapters: str, **options: Any) -> Any:
    """The same base, with adapters that ``seed`` decides."""
    first, *others = adapters or ("default",)
    base = Tower()
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, lora(**options), adapter_name=first)
    for name in others:
        model.add_adapter(name, lora(**options))
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save(path: Path, state: dict[str, Any], **options: Any) -> Path:
    with Checkpointer(path, **options) as run:
        run.save(1, state).result()
    assert Run(path).verify(1) == []
    return path / DIRECTORY


X = torch.linspace(-1, 1, 40).view(5, 8)


def test_peft_opens_a_checkpoint_as_it_lies(tmp_path: Path) -> None:
    model = adapted(1)
    where = save(tmp_path / "run", {"adapter": Adapters(model)})
    opened = peft.PeftModel.from_pretrained(Tower(), str(where))
    assert torch.equal(opened(X), model(X))
    assert not torch.equal(opened(X), Tower()(X))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": ["head"]},
        {"bias": "lora_only"},
        {"use_dora": True},
        {"use_rslora": True, "r": 2},
    ],
    ids=str,
)
def test_the_files_are_those_that_peft_writes(tmp_path: Path, options: dict[str, Any]) -> None:
    model = adapted(1, **options)
    where = save(tmp_path / "run", {"adapter": Adapters(model)})
    model.save_pretrained(str(tmp_path / "peft"))
    mine, theirs = (
        load_file(where / "adapter_model.safetensors"),
        load_file(tmp_path / "peft/adapter_model.safetensors"),
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (where, tmp_path / "peft")]
    for config in configs:  # sets have an order of their own in every process
        config |= {key: sorted(value) for key, value in config.items() if isinstance(value, list)}
    assert configs[0] == configs[1]
    assert {file.name for file in where.glob("*.safetensors*")} == {"adapter_model.safetensors"}, (
        "the base is named only"
    )


def test_training_goes_on_in_a_live_model(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[Any, torch.optim.Optimizer]:
        model = adapted(seed, modules_to_save=["head"])
        return model, torch.optim.AdamW(trainable(model), lr=0.1)

    def train(model: Any, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()

    model, optimizer = made(1)
    train(model, optimizer, 3)
    with Checkpointer(tmp_path) as run:
        run.watch(optimizer)
        run.save(3, {"adapter": Adapters(model), "optimizer": optimizer})
        train(model, optimizer, 3)
    other, again = made(2)
    kept = trainable(other)
    with Checkpointer(tmp_path) as run:
        report = run.resume({"adapter": Adapters(other), "optimizer": again})
    assert report is not None
    assert all(now is before for now, before in zip(trainable(other), kept, strict=True))
    train(other, again, 3)
    assert all(torch.equal(a, b) for a, b in zip(trainable(model), trainable(other), strict=True))


def test_several_adapters_lie_where_peft_puts_them(tmp_path: Path) -> None:
    model = adapted(1, "default", "style", modules_to_save=["head"])
    components = Adapters.all(model)
    assert list(components) == ["adapter", "adapter_style"]
    where = save(tmp_path / "run", dict(components))
    model.save_pretrained(str(tmp_path / "peft"))
    for folder in (".", "style"):
        mine = load_file(where / folder / "adapter_model.safetensors")
        theirs = load_file(tmp_path / "peft" / folder / "adapter_model.safetensors")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    opened = peft.PeftModel.from_pretrained(Tower(), str(where))
    opened.load_adapter(str(where / "style"), "style")
    for name in ("default", "style"):
        opened.set_adapter(name)
        model.set_adapter(name)
        assert torch.equal(opened(X), model(X))
    other = adapted(2, "style", "default", modules_to_save=["head"])
    assert Run(tmp_path / "run").restore(dict(Adapters.all(other))).whole
    for name in ("default", "style"):
        other.set_adapter(name)
        model.set_adapter(name)
        assert torch.equal(other(X), model(X))


def test_an_adapter_of_another_name_or_kind_is_a_mismatch_and_stays(tmp_path: Path) -> None:
    save(tmp_path, {"adapter": Adapters(adapted(1, "style"))})
    other = adapted(2, "default")
    before = copy.deepcopy(other)
    with pytest.raises(StateMismatch, match="saved as the adapter of name 'style', live 'default'"):
        Run(tmp_path).restore({"adapter": Adapters(other)})
    assert Run(tmp_path).restore({"adapter": Adapters(other)}, strict=False).mismatched
    assert torch.equal(other(X), before(X))
    tensors = Run(tmp_path).load(1, "adapter")  # the ways out
    assert tensors.pop("adapter")["name"] == "style"
    peft.set_peft_model_state_dict(other, tensors, adapter_name="default")
    assert torch.equal(other(X), adapted(1, "style")(X))
    third = adapted(2, "default", "style")
    Run(tmp_path).restore({"adapter": Adapters(third, "style")})
    third.set_adapter("style")
    assert torch.equal(third(X), adapted(1, "style")(X))


def test_an_adapter_of_another_rank_is_a_mismatch(tmp_path: Path) -> None:
    save(tmp_path, {"adapter": Adapters(adapted(1, r=4))})
    with pytest.raises(StateMismatch, match=r"lora_A\.weight: saved with shape \[4, 8\], live \[2, 8\]"):
        Run(tmp_path).restore({"adapter": Adapters(adapted(1, r=2))})


def test_tied_embeddings_of_a_language_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    def base_model() -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
        return transformers.LlamaForCausalLM(config)

    def made(seed: int) -> Any:
        base = base_model()
        torch.manual_seed(seed)
        options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(base, lora(**options, ensure_weight_tying=True))
        with torch.no_grad():
            for parameter in trainable(model):
                parameter.uniform_(-1, 1)
        return model

    model, other = made(1), made(2)
    where = save(tmp_path / "run", {"adapter": Adapters(model)})
    model.save_pretrained(str(tmp_path / "peft"))
    mine, theirs = (
        load_file(where / "adapter_model.safetensors"),
        load_file(tmp_path / "peft/adapter_model.safetensors"),
    )
    assert mine.keys() == theirs.keys()
    tokens = torch.arange(6).view(1, 6)
    Run(tmp_path / "run").restore({"adapter": Adapters(other)})
    assert torch.equal(other(tokens).logits, model(tokens).logits)
    opened = peft.PeftModel.from_pretrained(base_model(), str(where))
    assert torch.equal(opened(tokens).logits, model(tokens).logits)


def test_a_codec_and_weights_alone_leave_the_adapters_file_as_peft_reads_it(tmp_path: Path) -> None:
    from asyncckpt import Safetensors

    model = adapted(1, target_modules=["up"], r=8)
    with Checkpointer(tmp_path, files=Safetensors(codec="zstd"), assets={"notes.txt": b"mine"}) as run:
        run.save(1, {"adapter": Adapters(model), "noise": torch.randn(1 << 16)}, weights_only=True).result()
    where = next(tmp_path.glob("weights-step-*"))
    assert torch.equal(peft.PeftModel.from_pretrained(Tower(), str(where))(X), model(X))
    assert Run(tmp_path).assets(1).keys() == {"adapter_config.json", "notes.txt"}


def test_a_model_in_wrappers_is_found(tmp_path: Path) -> None:
    model = adapted(1)
    wrapped = nn.DataParallel(model)
    save(tmp_path, {"adapter": Adapters(wrapped)})
    other = adapted(2)
    Run(tmp_path).restore({"adapter": Adapters(other)})
    assert torch.equal(other(X), model(X))


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="not a Tower"):
        Adapters(Tower())
    several = adapted(1, "default", "style")
    with pytest.raises(InvalidOption, match=r"default, style.*Adapters\.all"):
        Adapters(several)
    with pytest.raises(InvalidOption, match="no adapter 'other'"):
        Adapters(several, "other")
    with pytest.raises(InvalidOption, match="folder of its name"):
        Adapters(adapted(1, "a b"))
    with Checkpointer(tmp_path) as run, pytest.raises(InvalidOption, match="both have to lie in adapter_model"):
        run.save(1, {"a": Adapters(several, "default"), "b": Adapters(several, "default")})
    component = Adapters(several, "style")
    several.delete_adapter("style")
    with Checkpointer(tmp_path) as run, pytest.raises(InvalidOption, match="make Adapters anew"):
        run.save(1, {"a": component})
