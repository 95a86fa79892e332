"""Trainings with DeepSpeed for ranks of a crew: plain or through asyncckpt, killed or not, resumed where it can be."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from frameworks.killing import count_calls
from support.harness import Me
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a training is to do. ``folder``: where it saves; ``tag``: what it resumes from, None for the latest.
    ``kill``: the rank that kills itself, and at which of its calls to the disk. ``options``: those of ``attach``."""

    folder: str
    stage: int = 2
    dtype: str = "bf16"
    ours: bool = True
    resume: bool = True
    tag: str | None = None
    last: int = 6
    every: int = 2
    seed: int = 0
    kill: tuple[int, int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """What a training has come to. ``end``: equal where all bits are. ``state``: what the client's state was, on
    resuming. ``calls``: to the disk, from when it began to train on."""

    first: int
    end: Any
    state: Any
    calls: int


def engine_of(asked: Asked) -> Any:
    import deepspeed

    if not dist.is_initialized():  # a crew of one has no job
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    torch.manual_seed(asked.seed)
    model = nn.Sequential(nn.Linear(9, 33), nn.Dropout(0.2), nn.LayerNorm(33), nn.ReLU(), nn.Linear(33, 5))
    model[0].bias.requires_grad_(False)
    model.register_buffer("kept", torch.arange(5.0))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}},
        "zero_optimization": {"stage": asked.stage},
        "gradient_clipping": 1.0,
    }
    if asked.dtype != "fp32":
        config[asked.dtype] = {"enabled": True}
    trained = [one for one in model.parameters() if one.requires_grad]
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def step(engine: Any, number: int, dtype: str) -> None:
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
    data = torch.randn(4, 9, generator=generator).to(kind)
    engine.backward(engine(data).float().square().mean())
    engine.step()


def digest(value: Any) -> Any:
    """Return a value that is equal where all bits are."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return (str(value.dtype), tuple(value.shape), hashlib.sha256(data).hexdigest())
    if isinstance(value, dict):
        return {str(key): digest(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [digest(item) for item in value]
    return digest(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, type) else repr(value)


def end_of(engine: Any) -> Any:
    schedule = engine.lr_scheduler.state_dict()
    rest = [list(engine.module.buffers()), schedule, engine.global_steps]
    parameters = list(engine.module.parameters())
    if not hasattr(parameters[0], "ds_tensor"):
        return digest([parameters, engine.optimizer.state_dict(), *rest])
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    # what fills up the parts of ZeRO 3 to one size is whatever lay in the memory
    rank = dist.get_rank()
    own = [one.ds_tensor[: max(0, one.ds_numel - rank * one.ds_tensor.numel())] for one in parameters]
    whole = [
        [safe_get_full_fp32_param(one), *(safe_get_full_optimizer_state(one, key) for key in ("exp_avg", "exp_avg_sq"))]
        for one in parameters
        if one.requires_grad
    ]
    return digest([own, whole, *rest])


def train(me: Me, asked: Asked) -> Ended:
    """Train from where the directory says to ``last``, saving every so many steps."""
    from asyncckpt.integrations.deepspeed import attach

    engine = engine_of(asked)
    saves = attach(engine, **asked.options) if asked.ours else None
    made = count_calls(asked.kill[1] if asked.kill is not None and asked.kill[0] == me.rank else None)
    first, state = 0, None
    saved = str(Path(asked.folder) / "saved")
    if asked.resume:
        path, state = engine.load_checkpoint(saved, tag=asked.tag)
        if path is not None:
            first = state["step"]
            torch.set_rng_state(state["rng"][me.rank % len(state["rng"])])
    for number in range(first, asked.last):
        step(engine, number, asked.dtype)
        if asked.every and (number + 1) % asked.every == 0:
            rng: list[Any] = [None] * me.size
            dist.all_gather_object(rng, torch.get_rng_state())
            given = {"step": number + 1, "rng": rng, "words": {"a": (1, None), 2: [True, 0.5]}}
            engine.save_checkpoint(saved, client_state=given, **asked.arguments)
    found = Ended(first, end_of(engine), (state or {}).get("words"), made[0])
    if saves is not None:
        saves.wait()
        found = Ended(found.first, found.end, found.state, made[0])
    engine.destroy()
    dist.barrier()
    return found
