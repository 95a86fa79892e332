"""A tensor's fully qualified name (FQN) is its name without the prefixes that wrappers add to it.

The names are those of ``torch.distributed.checkpoint.state_dict``: a model that was saved under DDP, ``torch.compile``
or activation checkpointing loads into the bare model, and the other way round.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import nn

#: Wrappers of several types keep the wrapped module in an attribute of one of these names.
_ALWAYS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_wrapped: weakref.WeakKeyDictionary[nn.Module, tuple[str, ...]] = weakref.WeakKeyDictionary()


def canonical_names(module: nn.Module, raw_names: Iterable[str]) -> dict[str, str]:
    """Map the raw ``state_dict`` keys of ``module`` to FQNs, in the order of ``raw_names``."""
    prefixes = _wrapper_prefixes(module)
    return {raw: _canonical(raw, prefixes) for raw in raw_names}


def parameter_names(modules: Mapping[str, nn.Module]) -> dict[int, tuple[str, str]]:
    """Map ``id(parameter)`` to ``(component, FQN)`` for every parameter of the modules. A tied parameter gets the first
    of its names."""
    found: dict[int, tuple[str, str]] = {}
    for component, module in modules.items():
        prefixes = _wrapper_prefixes(module)
        for raw, parameter in module.named_parameters(remove_duplicate=True):
            found.setdefault(id(parameter), (component, _canonical(raw, prefixes)))
    return found


def _canonical(raw: str, prefixes: tuple[str, ...]) -> str:
    # the longest prefix comes first, so that an inner wrapper is cut off before the outer one shifts its path
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
    """Return whether both tensors are the same view of the same memory. Such tensors are tied, and stored once."""
    return (
        first.data_ptr() == second.data_ptr()
        and first.dtype == second.dtype
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first.device == second.device
    )
