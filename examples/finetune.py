"""Pre-train a model, then fine-tune another one from it: renamed backbone, new head, fresh optimizer.

python examples/finetune.py --out runs/finetune
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import asyncckpt


class Pretrained(nn.Module):
    """Has a backbone and a head of 100 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU())
        self.head = nn.Linear(128, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


class Finetuned(nn.Module):
    """Has the same backbone under another name, and a head of 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU())
        self.head = nn.Linear(128, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


def train(model: nn.Module, classes: int, steps: int, run: Path) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"model": model, "optimizer": optimizer}
    with asyncckpt.Checkpointer(
        run, every=steps // 2, run=asyncckpt.RunOptions(overwrite=True, create_parents=True)
    ) as ckpt:
        ckpt.watch(optimizer)
        for step in range(1, steps + 1):
            loss = nn.functional.cross_entropy(model(torch.randn(64, 32)), torch.randint(0, classes, (64,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ckpt.step(step, state, metrics={"loss": loss.item()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    torch.manual_seed(0)

    before = Pretrained()
    train(before, 100, args.steps, args.out / "pretrain")
    pretrain = asyncckpt.Run(args.out / "pretrain")  # reading needs no Checkpointer, and no lease

    # All that does not fit is listed together, before anything is changed ...
    model = Finetuned()
    try:
        pretrain.restore({"model": model})
    except asyncckpt.StateMismatch as mismatch:
        print(f"as it is, it does not fit: {len(mismatch.missing)} missing, {len(mismatch.mismatched)} mismatched")

    # ... so say what goes where: the encoder is called backbone now, and the head stays as initialised.
    head = model.head.weight.clone()
    report = pretrain.restore(
        {"model": model},
        strict=False,
        rename={"model.encoder.": "model.backbone."},
        include=["model.backbone."],
    )
    assert torch.equal(model.backbone[0].weight, before.encoder[0].weight)
    assert torch.equal(model.head.weight, head)
    print(f"backbone of step {report.step} loaded, {report.nbytes} bytes read and verified; the head is new")

    # There are two other ways: without include=, strict=False reports what it left alone; or take single tensors by
    # name.
    report = pretrain.restore({"model": model}, strict=False, rename={"model.encoder.": "model.backbone."})
    print("left alone:", ", ".join([*report.missing, *report.unexpected, *report.mismatched]))
    weight = pretrain.load_tensors(names=["model.encoder.0.weight"])["model.encoder.0.weight"]
    print("one tensor by name:", tuple(weight.shape))

    train(model, 5, args.steps, args.out / "finetune")
    print("fine-tuned:", asyncckpt.Run(args.out / "finetune").ls()[-1].path)


if __name__ == "__main__":
    main()
