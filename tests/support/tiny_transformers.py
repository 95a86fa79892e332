"""A tiny model, data set and trainer of Transformers, for tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

from asyncckpt.integrations.transformers import AsyncCheckpointMixin

transformers.logging.set_verbosity_error()


class Words(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Has ``count`` rows of random tokens, always the same."""

    def __init__(self, count: int = 56, length: int = 8) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rows = torch.randint(0, 64, (count, length), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def model(seed: int = 0, width: int = 16) -> Any:
    """Make a Llama of some thousand parameters with dropout, so that random numbers matter."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_dropout=0.1,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


class StopAt(transformers.TrainerCallback):  # type: ignore[misc]
    """Ends training after a step, as an interruption would, at a step that is not saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


class AsyncTrainer(AsyncCheckpointMixin, transformers.Trainer):
    """The one line that a user changes."""


def arguments(folder: str, **options: Any) -> Any:
    given: dict[str, Any] = {
        "max_steps": 12,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }
    return transformers.TrainingArguments(output_dir=folder, **given)


def trainer(folder: str, kind: type[Any] = AsyncTrainer, of: Any = None, **options: Any) -> Any:
    """Make a trainer of the tiny model, which begins with the same random numbers each time."""
    extra = {name: options.pop(name) for name in ("eval_dataset", "callbacks", "compute_metrics") if name in options}
    return kind(model=model() if of is None else of, args=arguments(folder, **options), train_dataset=Words(), **extra)


def trained(folder: Path, kind: type[Any] = AsyncTrainer, resume: bool | str | None = None, **options: Any) -> Any:
    """Train the tiny model to its end, or on from where a checkpoint stands, and return its trainer."""
    one = trainer(str(folder), kind, **options)
    one.train(resume_from_checkpoint=resume)
    return one


def bits(of: Any) -> dict[str, torch.Tensor]:
    """Return the weights and the optimizer's state of a trainer, to be compared."""
    found = {name: value.detach().clone() for name, value in of.model.state_dict().items()}
    for number, entry in enumerate(of.optimizer.state_dict()["state"].values()):
        found |= {f"optimizer.{number}.{k}": v.clone() for k, v in entry.items() if isinstance(v, torch.Tensor)}
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
