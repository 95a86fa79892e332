"""torch's ``ZeroRedundancyOptimizer`` keeps on each rank an optimizer of its own for a part of the parameters.

Its ``state_dict`` has to be consolidated first, on one rank, by communicating. What is stored here instead is each
rank's own optimizer: ranks that hold the state of different parameters are what the ranks of a job are everywhere.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from asyncckpt.errors import UnsupportedValue


def local_optimizer(component: str, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer whose state this rank holds: ``optimizer`` itself, or that inside of a
    ``ZeroRedundancyOptimizer``, with the hyper-parameters that a schedule has given that one. Raises
    ``UnsupportedValue`` for one that steps inside of DDP's backward, which names ``component``."""
    zero: Any = optimizer if _is_zero(optimizer) else None
    if zero is None:
        return optimizer
    if zero._overlap_with_ddp:
        raise UnsupportedValue(
            f"state[{component!r}]: a ZeroRedundancyOptimizer with overlap_with_ddp=True is not stored, because it has "
            f"no optimizer of its own to store; make it with overlap_with_ddp=False, or use fully_shard (FSDP2)"
        )
    _copy_groups(zero, zero.optim)
    local: torch.optim.Optimizer = zero.optim
    return local


def after_restore(optimizer: torch.optim.Optimizer) -> None:
    """Give a ``ZeroRedundancyOptimizer`` the hyper-parameters of the restored optimizer inside of it. Does nothing for
    any other."""
    if _is_zero(optimizer):
        _copy_groups(optimizer.optim, optimizer)  # type: ignore[attr-defined]


def _is_zero(optimizer: torch.optim.Optimizer) -> bool:
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")  # else nothing can be one
    return module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer)


def _copy_groups(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    for theirs, ours in zip(source.param_groups, target.param_groups, strict=True):
        ours.update({key: value for key, value in theirs.items() if key != "params"})
