"""A tensor's fully qualified name (FQN) is its name without the prefixes that wrappers add to it.

The names are those of ``torch.distributed.checkpoint.state_dict``: a model that was saved under DDP, ``torch.compile``
or activation checkpointing loads into the bare model, and the other way round.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

#: Wrappers of several types keep the wrapped module in an attribute of one of these names.
_ALWAYS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
#: Only a name with one of these parts can have a wrapper's prefix; ``module`` is one below ``DistributedDataParallel``.
_MAYBE_WRAPPED = re.compile(r"(?m:^|\.)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")


def canonical_names(module: nn.Module, raw_names: Iterable[str]) -> dict[str, str]:
    """Map the raw ``state_dict`` keys of ``module`` to FQNs, in the order of ``raw_names``.

    The module is looked at anew each time: layers may be wrapped at any moment of a run. Where two keys would get the
    same FQN, as only a module and its own wrapper beside it can, both keep their raw names.
    """
    every = list(raw_names)
    if not _MAYBE_WRAPPED.search("\n".join(every)):  # one search in all of them takes a tenth of the time
        return dict(zip(every, every, strict=True))
    names = {raw: _canonical(raw, module) if _MAYBE_WRAPPED.search(raw) else raw for raw in every}
    if len(set(names.values())) == len(names):
        return names
    counts = Counter(names.values())
    return {raw: fqn if counts[fqn] == 1 else raw for raw, fqn in names.items()}


def parameter_names(
    modules: Mapping[str, nn.Module], named: Mapping[str, Mapping[str, nn.Parameter]] | None = None
) -> dict[int, tuple[str, str]]:
    """Map ``id(parameter)`` to ``(component, FQN)`` for every parameter of the modules. A tied parameter gets the first
    of its names. ``named``: the parameters of each module, under all names that they have there, where they are known
    already."""
    found: dict[int, tuple[str, str]] = {}
    for component, module in modules.items():
        parameters = named[component] if named is not None else dict(module.named_parameters(remove_duplicate=False))
        for raw, fqn in canonical_names(module, parameters).items():
            found.setdefault(id(parameters[raw]), (component, fqn))
    return found


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside all the wrappers around it whose prefixes FQNs leave out."""
    while True:
        names = module._modules.keys() & (_ALWAYS | ({"module"} if isinstance(module, _DATA_PARALLEL) else set()))
        inner = module._modules[names.pop()] if len(names) == 1 else None
        if inner is None:
            return module
        module = inner


_DATA_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def _canonical(raw: str, module: nn.Module) -> str:
    *path, leaf = raw.split(".")
    kept: list[str] = []
    here: nn.Module | None = module
    for part in path:
        if part not in _ALWAYS and not (part == "module" and isinstance(here, _DATA_PARALLEL)):
            kept.append(part)
        here = here._modules.get(part) if isinstance(here, nn.Module) else None
    return ".".join([*kept, leaf])


def same_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether both tensors are the same view of the same memory. Such tensors are tied, and stored once."""
    return (
        first.data_ptr() == second.data_ptr()
        and first.dtype == second.dtype
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first.device == second.device
    )
