"""A model with a frozen base and small matrices that are trained, sharded over the ranks of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from asyncckpt import Checkpointer
from support.harness import Me
from support.options import by_stage
from support.parallelisms import TIMEOUT

EXTENT = 64 << 10
#: Rows of the base; no number of ranks here divides them.
ROWS = 1003
BASE_BYTES = (ROWS * 257 + 64 * 96) * 4


class LoRA(nn.Module):
    """Has a frozen base, one part of it odd, and small matrices that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(256, ROWS).requires_grad_(False)
        self.more = nn.Linear(64, 96, bias=False).requires_grad_(False)
        self.down = nn.Linear(256, 8, bias=False)
        self.up = nn.Linear(8, ROWS, bias=False)


def lora(me: Me, way: str = "fsdp2") -> dict[str, Any]:
    """The state of a LoRA, sharded; the values follow from a seed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.manual_seed(4)
    model = LoRA()
    if me.size > 1 and way == "tp":
        model = parallelize_module(model, init_device_mesh("cpu", (me.size,)), {"base": ColwiseParallel()})
    elif me.size > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (me.size,)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return {"model": model, "optimizer": optimizer}


def train(state: dict[str, Any], step: int) -> None:
    for parameter in state["model"].parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, float(step))
    state["optimizer"].step()


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[no-any-return]


def spoil(state: dict[str, Any], value: float = 5.0) -> None:
    with torch.no_grad():
        local_part(state["model"].base.weight)[0, 3] = value


def whole(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All values of the model, on every rank."""
    found = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in state["model"].named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def wrong_in(run: Checkpointer, step: int, expected: dict[str, torch.Tensor]) -> list[str]:
    """What is not stored as expected, or damaged."""
    wrong = [str(one) for one in run.verify(step)]
    stored = run.load_tensors(step, ["model"])
    return wrong + [name for name, tensor in expected.items() if not torch.equal(stored[f"model.{name}"], tensor)]


def shared_base(path: str, old: int, new: int) -> bool:
    """Whether two checkpoints share the file of the frozen tensors, and no other of the model's."""
    before, after = (
        {file.name: file.stat().st_ino for file in Path(path, f"step-{step:08}").glob("model*")} for step in (old, new)
    )
    assert before.keys() == after.keys()
    same = {name for name in before if before[name] == after[name]}
    assert same <= {"model-00001-of-00002.safetensors"}, same
    return bool(same)


def opened(path: str, **options: Any) -> Checkpointer:
    run = Checkpointer(path, **by_stage(**{"extent_bytes": EXTENT, "ranks": TIMEOUT} | options))
    run._store.reflinks = False  # type: ignore[union-attr]  # an inode says then what was linked
    return run


def save(run: Checkpointer, step: int, state: dict[str, Any]) -> int:
    """Save, wait until the next save can build on it, and return how many bytes this rank wrote."""
    report = run.save(step, state).result(60)
    run.wait()
    return report.written_bytes


def stored(me: Me, run: Checkpointer, step: int, state: dict[str, Any]) -> list[str]:
    """What of a step is not as the state is now. All ranks have to call."""
    expected = whole(state)
    wrong = [f"step {step}: {one}" for one in wrong_in(run, step, expected)] if me.rank == 0 else []
    dist.barrier()
    return wrong
