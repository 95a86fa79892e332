"""Fully qualified names (FQNs): what wrappers add to a parameter's name is taken off again.

The names are those of ``torch.distributed.checkpoint.state_dict``: a model saved under DDP, ``torch.compile`` or
activation checkpointing loads into the bare model and back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import nn

#: Attribute names under which wrappers keep the wrapped module, whatever the wrapper's type.
_ALWAYS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_wrapped: weakref.WeakKeyDictionary[nn.Module, tuple[str, ...]] = weakref.WeakKeyDictionary()


def canonical_names(module: nn.Module, raw_names: Iterable[str]) -> dict[str, str]:
    """Raw ``state_dict`` key → FQN, in the order given."""
    prefixes = _wrapper_prefixes(module)
    return {raw: _canonical(raw, prefixes) for raw in raw_names}


def parameter_names(modules: Mapping[str, nn.Module]) -> dict[int, tuple[str, str]]:
    """``id(parameter)`` → (component, FQN), the first name of a tied parameter winning."""
    found: dict[int, tuple[str, str]] = {}
    for component, module in modules.items():
        prefixes = _wrapper_prefixes(module)
        for raw, parameter in module.named_parameters(remove_duplicate=True):
            found.setdefault(id(parameter), (component, _canonical(raw, prefixes)))
    return found


def _canonical(raw: str, prefixes: tuple[str, ...]) -> str:
    # longest first, so that a wrapper inside a wrapper is cut before the outer one shifts its path
    for prefix in prefixes:
        if raw.startswith(prefix):
            head = prefix[:-1].rpartition(".")[0]
            raw = (head + "." if head else "") + raw[len(prefix) :]
    return raw


def _wrapper_prefixes(module: nn.Module) -> tuple[str, ...]:
    known = _wrapped.get(module)
    if known is None:
        data_parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
        paths: list[str] = []
        for path, child in module.named_modules():
            leaf = path.rpartition(".")[2]
            if leaf in _ALWAYS:
                paths.append(path + ".")
            if isinstance(child, data_parallel):
                paths.append(f"{path}.module." if path else "module.")
        known = _wrapped[module] = tuple(sorted(paths, key=len, reverse=True))
    return known


def same_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether both are the very same view of the same memory: tied, so stored once."""
    return (
        first.data_ptr() == second.data_ptr()
        and first.dtype == second.dtype
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first.device == second.device
    )
