"""Many ranks (FSDP2) pretrain a GPT on real text; the run outlives its processes and its number of ranks.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # or torch 2.13 cannot connect again after a restart
    torchrun --nproc-per-node 4 --max-restarts 3 examples/pretrain_fsdp2.py --out runs/gpt
    kill -9 <pid of a rank>       # torchrun starts all of them again; they go on from the newest checkpoint
    torchrun --nproc-per-node 2 examples/pretrain_fsdp2.py --out runs/gpt --steps 400   # goes on, on two

The example uses NCCL on GPUs and gloo elsewhere. The text is the Python sources of the standard library.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import asyncckpt
from asyncckpt.demo.data import TextLoader, collect
from asyncckpt.demo.gpt import VOCABULARY, Gpt, GptOptions


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/pretrain", help="the run directory, the same for all ranks")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps from one checkpoint to the next")
    parser.add_argument(
        "--batch", type=int, default=24, help="of all ranks together: data does not depend on their number"
    )
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank-timeout", type=float, default=300.0, help="seconds a save waits for a rank")
    return parser.parse_args()


def text(out: Path) -> Path:
    """Write the text beside the run, on one rank of each host, and return its path."""
    path = out.with_name(f"{out.name}-corpus-{os.environ.get('GROUP_RANK', '0')}.txt")
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        collect(path)
    dist.barrier()
    return path


def main() -> None:
    args = arguments()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cuda:nccl,cpu:gloo" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda" if on_gpu else "cpu")
    if args.batch % ranks:
        raise SystemExit(f"--batch {args.batch} cannot be dealt out to {ranks} ranks; give a multiple of it")

    torch.manual_seed(0)  # the same model on every rank, whatever their number
    options = GptOptions(width=args.width, layers=args.layers, dropout=0.0)
    model = Gpt(options).to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20)
    loader = TextLoader(text(Path(args.out)), batch=args.batch, context=options.context, seed=7)
    losses = asyncckpt.Replicated([])

    ckpt = asyncckpt.Checkpointer(
        args.out,
        every=args.every,
        keep=asyncckpt.KeepLast(3),
        ranks=asyncckpt.RankOptions(timeout_seconds=args.rank_timeout),
        run=asyncckpt.RunOptions(create_parents=True),
    )
    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": asyncckpt.Replicated(scheduler),  # stored once: it is the same on every rank, however many
        "loader": asyncckpt.Replicated(loader),
        "losses": losses,
        "rng": asyncckpt.RngState(),  # stored once a rank
    }
    ckpt.watch(optimizer)  # saves may now overlap forward and backward
    with ckpt:
        start = ckpt.resume(state)  # every rank gets the same step
        if rank == 0:
            print(f"{ranks} ranks, starting after step {start}", flush=True)
        batches = iter(loader)
        for step in range(start + 1, args.steps + 1):
            began = time.perf_counter()
            inputs, targets = (tensor[rank::ranks].to(device) for tensor in next(batches))
            loss = functional.cross_entropy(model(inputs).view(-1, VOCABULARY), targets.reshape(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            mean = loss.detach()
            dist.all_reduce(mean)
            losses.value.append(mean.item() / ranks)
            ckpt.step(step, state, metrics={"loss": losses.value[-1]})  # microseconds, unless a save is due
            if rank == 0:
                print(f"step {step}: loss {losses.value[-1]:.6f}, {time.perf_counter() - began:.3f} s", flush=True)
    if rank == 0:
        Path(f"{args.out}-losses.txt").write_text("".join(f"{loss!r}\n" for loss in losses.value))
        print("checkpoints:", ", ".join(f"step {one.step} (loss {one.metrics['loss']:.3f})" for one in ckpt.ls()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
