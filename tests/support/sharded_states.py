"""One training state is cut up here in every way: what a rank holds of it, and which rank it is.

All values are exact (one IEEE operation each), so that they do not depend on how a tensor is cut.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import asyncckpt

PARALLELISMS = ("ddp", "fsdp2", "hsdp", "tp", "fsdp2+tp", "ep", "pp", "shards")


class Experts(nn.Module):
    """Has one matrix an expert; no number of ranks here divides the experts' number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 60, 33))


class Net(nn.Module):
    """Has parts of all sizes: rows that no number of ranks divides, fewer rows than ranks, one element, none at all,
    and tensors that are large enough to be divided among those that hold copies."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(1003, 64)
        self.a = nn.Linear(64, 257)
        self.norm = nn.LayerNorm(257)
        self.b = nn.Linear(257, 128, bias=False)
        self.big = nn.Linear(900, 700)
        self.few = nn.Linear(40, 3)
        self.one = nn.Linear(1, 1)
        self.even = nn.Linear(64, 96)
        self.experts = Experts()
        self.last = nn.Linear(512, 768, bias=False)
        self.register_buffer("seen", torch.arange(11.0))
        self.register_buffer("nothing", torch.empty(0, 3))


class Loader:
    """Has a state of each rank: where this rank's data loader stands."""

    def __init__(self, rank: int) -> None:
        self.position = 1000 + rank

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def possible(parallelism: str, size: int) -> bool:
    """Whether the parallelism exists at this world size."""
    return {"hsdp": size in (4, 8), "fsdp2+tp": size in (4, 8)}.get(parallelism, size > 1)


def build(parallelism: str, rank: int, size: int) -> dict[str, Any]:
    """Build the training state as this rank holds it; with ``size`` 1, all of it."""
    own = {"loader": Loader(rank), "rng": asyncckpt.RngState(), "epoch": {"n": 3}}
    torch.manual_seed(100 + rank)
    if parallelism == "shards":
        return {"weights": {"parts": _shards(rank, size), "step": 7}, **own}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _parallel(Net(), parallelism, rank, size)
    optimizer = _optimizer(model)
    return {"model": model, "optimizer": optimizer, **own}


def _parallel(model: nn.Module, parallelism: str, rank: int, size: int) -> nn.Module:
    if size == 1:
        return model
    if parallelism == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if parallelism == "pp":
        children = [name for name, _ in model.named_children()]
        for number, name in enumerate(children):
            if number * size // len(children) != rank:
                delattr(model, name)
        return model
    from torch.distributed.device_mesh import init_device_mesh

    if parallelism == "fsdp2":
        return _fsdp(model, init_device_mesh("cpu", (size,)))
    if parallelism == "hsdp":
        return _fsdp(model, init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copies", "parts")))
    if parallelism == "ep":
        return _ep(model, init_device_mesh("cpu", (size,)))
    if parallelism == "tp":
        return _tp(model, init_device_mesh("cpu", (size,)))
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    return _fsdp(_tp(model, mesh["tp"]), mesh["dp"])


def _fsdp(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for child in model.children():
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _ep(model: nn.Module, mesh: Any) -> nn.Module:
    """Give each rank some experts; everything else is replicated."""
    from torch.distributed.tensor import Shard, distribute_tensor

    experts = model.experts
    experts.weight = nn.Parameter(distribute_tensor(experts.weight.detach(), mesh, [Shard(0)]))
    return model


def _tp(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"emb": RowwiseParallel(), "a": ColwiseParallel(), "b": RowwiseParallel(), "last": ColwiseParallel()}
    return parallelize_module(model, mesh, {**plan, "even": ColwiseParallel(), "big": RowwiseParallel()})


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Make an AdamW whose state is a function of the parameters, as after some training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            optimizer.state[parameter]["exp_avg"].copy_(parameter * 0.5)
            optimizer.state[parameter]["exp_avg_sq"].copy_(parameter * parameter)
    optimizer.zero_grad()
    return optimizer


#: Each name has a shape. 5 rows leave some of 8 ranks empty; 4099 are uneven everywhere.
_GLOBAL = {"wide": (4099, 130), "few": (5, 7), "vector": (1001,), "cube": (12, 3, 5)}


def _shards(rank: int, size: int) -> dict[str, asyncckpt.LocalShard]:
    """Cut as Megatron does: ranks hold rows of very different numbers."""
    found: dict[str, asyncckpt.LocalShard] = {}
    for name, shape in _GLOBAL.items():
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        weights = [0, *torch.cumsum(torch.arange(1, size + 1), 0).tolist()]
        first, end = (shape[0] * weights[at] // weights[-1] for at in (rank, rank + 1))
        found[name] = asyncckpt.LocalShard(whole[first:end].clone(), shape, (first, *[0] * (len(shape) - 1)))
    return found


def local(value: Any) -> torch.Tensor:
    """Return what lies on this rank."""
    if isinstance(value, asyncckpt.LocalShard):
        return value.tensor
    return value.to_local() if hasattr(value, "to_local") else value


def contents(state: dict[str, Any]) -> dict[str, bytes]:
    """Return the exact bytes of everything in the state that lies on this rank, by name; the optimizer's come through
    torch's own ``get_optimizer_state_dict``."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    found: dict[str, Any] = {"epoch": state["epoch"], "loader": state["loader"].state_dict()}
    if "weights" in state:
        found["weights"] = state["weights"]
    else:
        found["model"] = state["model"].state_dict()
        found["optimizer"] = get_optimizer_state_dict(state["model"], state["optimizer"])
    found["rng"] = state["rng"].state_dict()
    flat: dict[str, bytes] = {}
    _flatten("", found, flat)
    return flat


def _flatten(name: str, value: Any, into: dict[str, bytes]) -> None:
    if isinstance(value, torch.Tensor | asyncckpt.LocalShard):
        tensor = local(value).detach().contiguous()
        into[name] = str(tuple(tensor.shape)).encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        for key, item in value.items():
            _flatten(f"{name}/{key}", item, into)
    elif isinstance(value, list | tuple):
        for key, item in enumerate(value):
            _flatten(f"{name}/{key}", item, into)
    else:
        into[name] = repr(value).encode()


def scramble(state: dict[str, Any]) -> None:
    """Make everything wrong, in place, as in a program that has just started."""
    with torch.no_grad():
        if "weights" in state:
            for shard in state["weights"]["parts"].values():
                shard.tensor.fill_(-1)
            state["weights"]["step"] = 0
        else:
            for tensor in (*state["model"].parameters(), *state["model"].buffers()):
                local(tensor).fill_(-1)
            for entry in state["optimizer"].state.values():
                for tensor in entry.values():
                    local(tensor).fill_(-1)
    state["loader"].position = -1
    state["epoch"]["n"] = -1
    torch.manual_seed(99)


def needed_bytes(state: dict[str, Any]) -> int:
    """Return the bytes of tensors on this rank."""
    if "weights" in state:
        return sum(shard.tensor.nbytes for shard in state["weights"]["parts"].values())
    tensors = [*state["model"].parameters(), *state["model"].buffers()]
    for entry in state["optimizer"].state.values():
        tensors += entry.values()
    return sum(local(tensor).nbytes for tensor in tensors)


def barrier(size: int) -> None:
    if size > 1:
        dist.barrier()
