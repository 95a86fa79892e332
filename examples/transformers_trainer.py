"""Train a tiny language model with the Trainer of Transformers; run it again after a Ctrl-C, and it goes on.

python examples/transformers_trainer.py --out runs/trainer
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from asyncckpt.integrations.transformers import AsyncCheckpointMixin


class MyTrainer(AsyncCheckpointMixin, Trainer):
    """Is the whole change."""


class Text(torch.utils.data.Dataset):
    """Has windows of a text, a byte a token."""

    def __init__(self, text: bytes, length: int) -> None:
        self.tokens, self.length = torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.tokens[index * self.length : (index + 1) * self.length]
        return {"input_ids": window, "labels": window}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/trainer"))
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=4, **shape))
    options = TrainingArguments(
        str(args.out),
        max_steps=args.steps,
        save_steps=max(1, args.steps // 5),
        save_total_limit=2,
        per_device_train_batch_size=8,
        logging_steps=max(1, args.steps // 10),
        report_to=[],
    )
    text = Path(__file__).read_bytes() * 8
    trainer = MyTrainer(model=model, args=options, train_dataset=Text(text, 64))
    trainer.train(resume_from_checkpoint=any(args.out.glob("checkpoint-*")))
    print(f"step {trainer.state.global_step} is saved in {trainer.state.best_model_checkpoint or args.out}")


if __name__ == "__main__":
    main()
