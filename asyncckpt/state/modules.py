"""A module is captured by its ``state_dict``: parameters and buffers by name, and what else it has as plain values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from asyncckpt import jsontree
from asyncckpt.errors import UnsupportedValue
from asyncckpt.protocols import LiesInFile
from asyncckpt.state.class_names import class_name
from asyncckpt.state.dtensor import is_distributed, is_sharded_tensor
from asyncckpt.state.fqn import canonical_names, same_memory
from asyncckpt.state.fsdp1 import sharded_state_dict
from asyncckpt.state.kept import KeptCaptures, keep_module, mark_buffers
from asyncckpt.state.pieces import piece_of, sink, strides_of
from asyncckpt.state.wrappers import PLAIN_TYPES, hides_values
from asyncckpt.types import ComponentSnapshot, JsonValue, LocalTensor


def capture_module(
    name: str, module: nn.Module, parameters: Mapping[str, nn.Parameter], kept: KeptCaptures
) -> ComponentSnapshot:
    """Capture a module by its ``state_dict``. ``parameters``: its own by name, tied ones by each. ``kept``: what the
    captures before have made."""
    raw = _state_dict(module, parameters)
    if not PLAIN_TYPES.issuperset(map(type, raw.values())):
        _check_initialised(name, raw)
    names = canonical_names(module, raw)
    frozen = _frozen(parameters)
    buffers = _buffers(module) if not parameters.keys() >= raw.keys() else frozenset()
    fqns, values = list(names.values()), list(raw.values())
    known = kept.modules.pop(name, None)
    pieces = known.pieces(fqns, values, frozen, buffers) if known is not None else None
    if known is not None and pieces is not None:
        kept.modules[name] = known
        aliases = dict(known.aliases)
        return ComponentSnapshot(name, "module", pieces, aliases, {}, True, class_name(module), strides_of(pieces))
    snapshot = _new_module(name, module, raw, names, parameters, frozen, buffers)
    made = keep_module(fqns, values, frozen, snapshot.pieces, snapshot.aliases)
    if made is not None and not isinstance(module, LiesInFile):  # which may lie elsewhere next time
        kept.modules[name] = made
    return snapshot


def _new_module(
    name: str,
    module: nn.Module,
    raw: Mapping[str, Any],
    names: Mapping[str, str],
    parameters: Mapping[str, nn.Parameter],
    frozen: Collection[int],
    buffers: Collection[str],
) -> ComponentSnapshot:
    """Capture a module whose ``state_dict`` is ``raw``, with the FQNs ``names``; ``frozen`` has the addresses of frozen
    parameters."""
    pieces: list[LocalTensor] = []
    aliases: dict[str, str] = {}
    extras: dict[str, Any] = {}
    wrapped: dict[str, Any] = {}
    first_views: dict[tuple[int, torch.dtype], list[tuple[str, torch.Tensor]]] = {}
    add = sink(name, pieces)
    file = module.checkpoint_file if isinstance(module, LiesInFile) else ""
    first_names: dict[int, str] = {}
    for key, value in raw.items():
        fqn = names[key]
        if not isinstance(value, torch.Tensor) and not is_sharded_tensor(value):
            extras[fqn] = value
            continue
        if type(value) not in PLAIN_TYPES and jsontree.is_wrapper(value):
            wrapped[key] = value
            continue
        if is_distributed(value) or is_sharded_tensor(value):
            # this rank's part may be empty, so tied tensors cannot be recognised by their memory
            parameter = parameters.get(key)
            first = first_names.setdefault(id(parameter), fqn) if parameter is not None else fqn
            if first != fqn:
                aliases[fqn] = first
            else:
                still = parameter is not None and not parameter.requires_grad
                pieces.append(piece_of(name, fqn, value, frozen=still))
            continue
        if value.numel() and value.layout is torch.strided and not file:  # its reader wants every name in the file
            seen = first_views.setdefault((value.data_ptr(), value.dtype), [])
            twin = next((known for known, other in seen if same_memory(other, value)), None)
            if twin is not None:
                aliases[fqn] = twin
                continue
            seen.append((fqn, value))
        pieces.append(piece_of(name, fqn, value, frozen=value.data_ptr() in frozen))
    mark_buffers(pieces, buffers)
    count = len(pieces)
    tree: JsonValue = jsontree.encode(extras, "", add, component=name)
    for piece in pieces[count:]:
        piece.first_only = True
    for piece in pieces if file else ():
        piece.spec = replace(piece.spec, file=file)
    if wrapped:
        tree = {
            **_wrappers(name, module, parameters, wrapped, names, pieces, aliases),
            **(tree if isinstance(tree, dict) else {}),
        }
    return ComponentSnapshot(name, "module", pieces, aliases, tree, True, class_name(module), strides_of(pieces))


def _check_initialised(name: str, raw: Mapping[str, Any]) -> None:
    for key, value in raw.items():
        if type(value) not in PLAIN_TYPES and is_lazy(value):
            raise UnsupportedValue(
                f"state[{name!r}][{key!r}]: a lazy parameter or buffer that is not initialised yet has no values to "
                f"save; run the module once before the first save"
            )


def _wrappers(
    name: str,
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    wrapped: Mapping[str, Any],
    names: Mapping[str, str],
    pieces: list[LocalTensor],
    aliases: dict[str, str],
) -> dict[str, JsonValue]:
    """Add the tensors inside of those of a module that wrap others, and return what else is stored of these, by FQN.
    ``wrapped``: by ``state_dict`` key; what the module itself holds is stored, because a class may copy what it wraps
    when ``state_dict`` detaches it."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    trees: dict[str, JsonValue] = {}
    for key, value in wrapped.items():
        fqn, parameter = names[key], parameters.get(key)
        held = parameter if parameter is not None else buffers.get(key)
        tensor = held if held is not None and jsontree.is_wrapper(held) else value
        still = parameter is not None and not parameter.requires_grad
        found: list[LocalTensor] = []

        def add(inner: str, part: torch.Tensor, still: bool = still, found: list[LocalTensor] = found) -> None:
            found.append(piece_of(name, inner, part, frozen=still))

        trees[fqn] = jsontree.encode(tensor, fqn, add, component=name)
        twin = first.setdefault(id(tensor), fqn)
        if twin != fqn:
            aliases.update({piece.spec.name: f"{twin}{piece.spec.name[len(fqn) :]}" for piece in found})
            continue
        for piece in found:
            piece.first_only = parameter is None
        pieces += found
    return trees


def _buffers(module: nn.Module) -> frozenset[str]:
    """Return the FQNs of the module's buffers: replicas of a job may have different ones (the running statistics of
    batch norms), and then the first rank's are right, as they are for DDP."""
    raw = [name for name, _ in module.named_buffers(remove_duplicate=False)]
    return frozenset(canonical_names(module, raw).values())


def _state_dict(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Mapping[str, Any]:
    """Return the module's ``state_dict``. Where possible its DTensors are the parameters themselves: to detach one
    takes 30 us."""
    if type(module).state_dict is not nn.Module.state_dict or not any(map(is_distributed, parameters.values())):
        with sharded_state_dict(module):
            return module.state_dict()
    raw = module.state_dict(keep_vars=True)
    return {
        key: value.detach() if isinstance(value, torch.Tensor) and not is_distributed(value) else value
        for key, value in raw.items()
    }


def _frozen(parameters: Mapping[str, nn.Parameter]) -> set[int]:
    """Return the addresses of the parameters that training does not change. A parameter that shares its memory with a
    trained one is left out."""
    if all(parameter.requires_grad for parameter in parameters.values()):
        return set()
    here = [p for p in parameters.values() if p.numel() and not p.is_meta and not hides_values(p)]
    here = [p for p in here if not is_distributed(p)]
    trained = {parameter.data_ptr() for parameter in here if parameter.requires_grad}
    return {parameter.data_ptr() for parameter in here} - trained
