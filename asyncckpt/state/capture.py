"""``capture`` turns live objects into a flat ``Snapshot``: names, references to tensors, and copies of plain values.

How a component is captured depends on its type: an ``nn.Module`` by its ``state_dict``, an optimizer by its state keyed
by parameter name, any other object that has ``state_dict`` and ``load_state_dict`` by those, a tensor as itself, and
everything else as plain data. No tensor is copied.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from asyncckpt import jsontree
from asyncckpt.errors import InvalidOption, UnsupportedValue
from asyncckpt.memory.tensor_bytes import is_dense
from asyncckpt.protocols import Stateful
from asyncckpt.state.dtensor import is_distributed, is_sharded_tensor, local_rows, sharded_tensor_rows
from asyncckpt.state.dtypes import CODES
from asyncckpt.state.fqn import canonical_names, parameter_names, same_memory, unwrapped
from asyncckpt.state.kept import PLAIN_TYPES, KeptCaptures, keep_module, keep_state, mark_buffers
from asyncckpt.state.markers import LocalShard, Replicated, without_owners, without_shards
from asyncckpt.state.optimizer import (
    group_parameters,
    named_optimizer_state,
    object_state,
    rename_group_tensors,
    wrapped_optimizer,
)
from asyncckpt.state.zero_redundancy import local_optimizer
from asyncckpt.types import ComponentSnapshot, JsonValue, LocalTensor, Snapshot, TensorSpec

#: Names of components become file names; ``manifest/parse.py`` checks them when they are read.
#: A name has no dots: tensors are named ``component.fqn``, and ``a.b`` + ``c`` must differ from ``a`` + ``b.c``.
_COMPONENT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_=+-]{0,199}\Z")
#: In a job, what a rank has of its own is stored under such a name; checkpoints that have one are read all the same.
_OF_A_RANK = re.compile(r"\+[0-9]+\Z")
#: Longer names of classes are left out; readers take them for an attack.
_LONGEST_NAME = 1000
_RESERVED = frozenset({"state", "manifest", "latest"})
Sink = Callable[[str, torch.Tensor], None]


@torch.no_grad()  # autograd would make a node for each DTensor's local part, which takes longer than all the rest
def capture(
    state: Mapping[str, Any], step: int, *, weights_only: bool = False, kept: KeptCaptures | None = None
) -> Snapshot:
    """Capture the training state, or with ``weights_only`` its modules alone. ``kept``: what the captures before have
    made, and this one will; the result is the same without.

    Runs on the training thread, takes milliseconds, and waits for no other rank: a ``DTensor`` that has to be
    redistributed is left to whoever knows that all ranks have come so far (``LocalTensor.redistribute``). Raises
    ``UnsupportedValue``, which names the path of the value that cannot be stored, and ``InvalidOption`` where the
    component names cannot be used or ``weights_only`` finds no module.
    """
    check_state(state)
    for name in state:
        if _OF_A_RANK.search(name):
            raise InvalidOption(
                f"component name {name!r} ends like those that the ranks of a job get ('rng+1'): rename it, to "
                f"{name.replace('+', '_')!r} say"
            )
    state, owners = without_owners(state)
    kept = KeptCaptures() if kept is None else kept
    modules = {name: value for name, value in state.items() if isinstance(value, nn.Module)}
    parameters = {name: dict(one.named_parameters(remove_duplicate=False)) for name, one in modules.items()}
    if weights_only:
        if not modules:
            raise InvalidOption("weights_only: the state holds no torch.nn.Module")
        components = [_module(name, module, parameters[name], kept) for name, module in modules.items()]
    else:
        names = parameter_names(modules, parameters)
        components = [
            _module(name, value, parameters[name], kept)
            if name in modules
            else _component(name, value, state, names, kept)
            for name, value in state.items()
        ]
    for component in components:
        if component.name in owners:
            component.shared, component.owner = True, owners[component.name]
    return Snapshot(step, components)


def check_state(state: Mapping[str, Any]) -> None:
    """Check that ``state`` maps usable component names to values. Raises ``InvalidOption`` where it does not."""
    if not isinstance(state, Mapping) or not state:
        raise InvalidOption("state must be a non-empty dict of components, such as {'model': model, 'optimizer': opt}")
    folded: set[str] = set()
    for name in state:
        if not isinstance(name, str) or not _COMPONENT_NAME.match(name) or name.casefold() in _RESERVED:
            raise InvalidOption(
                f"component name {name!r} cannot be used: letters, digits and _=+- only, not beginning with a sign, "
                f"and not one of {', '.join(sorted(_RESERVED))}"
            )
        if name.casefold() in folded:
            raise InvalidOption(f"component name {name!r} differs from another one only in case")
        folded.add(name.casefold())


def kind_of(value: Any) -> str:
    """Return how a component is captured and restored: ``module``, ``optimizer``, ``stateful``, ``tensor`` or
    ``plain``."""
    if isinstance(value, nn.Module):
        return "module"
    if isinstance(value, torch.optim.Optimizer):
        return "optimizer"
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, Stateful) and not isinstance(value, type):
        return "stateful"
    return "plain"


def class_name(value: Any) -> str:
    """Return the qualified name of an object's class, without the wrappers whose prefixes FQNs leave out and without
    optimizers that only hand on to another one. It is empty where it would be absurdly long."""
    if isinstance(value, nn.Module):
        value = unwrapped(value)
    elif isinstance(value, torch.optim.Optimizer):
        value = wrapped_optimizer(value)
    found = f"{type(value).__module__}.{type(value).__qualname__}"
    return found if len(found) <= _LONGEST_NAME else ""


def _component(
    name: str, value: Any, state: Mapping[str, Any], owners: Mapping[int, tuple[str, str]], kept: KeptCaptures
) -> ComponentSnapshot:
    kind = kind_of(value)
    if kind == "optimizer":
        return _optimizer(name, value, state, owners, kept)
    type_name = class_name(value) if kind == "stateful" else ""
    pieces: list[LocalTensor] = []
    shared = kind == "tensor" or isinstance(value, Replicated)
    if kind == "stateful":
        value = value.state_dict()
    shards: dict[int, LocalShard] = {}
    value = without_shards(value, shards)
    tree = jsontree.encode(value, "", _sink(name, pieces, shards), component=name)
    shared = shared or any(piece.rows is not None or piece.span is not None for piece in pieces)
    return ComponentSnapshot(name, kind, pieces, {}, tree, shared, type_name, _strides(pieces))


def _optimizer(
    name: str,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    owners: Mapping[int, tuple[str, str]],
    kept: KeptCaptures,
) -> ComponentSnapshot:
    type_name = class_name(local_optimizer(name, optimizer))
    kind, value = named_optimizer_state(name, optimizer, owners, state)
    pieces: list[LocalTensor] = []
    # where there is more beside these two, names of tensors may depend on it
    keepable = kind == "optimizer" and list(value) == ["state", "param_groups"]
    known = kept.states.get(name) if keepable else None
    found = known.pieces(value["state"]) if known is not None else None
    if known is not None and found is not None:
        pieces += found
        value = {**value, "state": jsontree.Encoded(known.tree)}
    tree: Any = jsontree.encode(value, "", _sink(name, pieces), component=name, objects=object_state)
    if keepable and found is None:
        of_state = [piece for piece in pieces if piece.spec.name.startswith("state.")]
        made = keep_state(value["state"], of_state, tree["state"])
        kept.states.pop(name, None)
        if made is not None:
            kept.states[name] = made
    if kind == "optimizer":
        rename_group_tensors(tree, pieces)
    snapshot = ComponentSnapshot(name, kind, pieces, {}, tree, True, type_name, _strides(pieces))
    if kind == "optimizer":
        snapshot.parameters = group_parameters(tree)
    return snapshot


def _module(
    name: str, module: nn.Module, parameters: Mapping[str, nn.Parameter], kept: KeptCaptures
) -> ComponentSnapshot:
    raw = _state_dict(module, parameters)
    names = canonical_names(module, raw)
    frozen = _frozen(parameters)
    buffers = _buffers(module) if not parameters.keys() >= raw.keys() else frozenset()
    fqns, values = list(names.values()), list(raw.values())
    known = kept.modules.pop(name, None)
    pieces = known.pieces(fqns, values, frozen, buffers) if known is not None else None
    if known is not None and pieces is not None:
        kept.modules[name] = known
        aliases = dict(known.aliases)
        return ComponentSnapshot(name, "module", pieces, aliases, {}, True, class_name(module), _strides(pieces))
    snapshot = _new_module(name, module, raw, names, parameters, frozen, buffers)
    made = keep_module(fqns, values, frozen, snapshot.pieces, snapshot.aliases)
    if made is not None:
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
    first_views: dict[tuple[int, torch.dtype], list[tuple[str, torch.Tensor]]] = {}
    add = _sink(name, pieces)
    first_names: dict[int, str] = {}
    for key, value in raw.items():
        fqn = names[key]
        if not isinstance(value, torch.Tensor) and not is_sharded_tensor(value):
            extras[fqn] = value
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
        if value.numel() and value.layout is torch.strided:
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
    return ComponentSnapshot(name, "module", pieces, aliases, tree, True, class_name(module), _strides(pieces))


def _buffers(module: nn.Module) -> frozenset[str]:
    """Return the FQNs of the module's buffers: replicas of a job may have different ones (the running statistics of
    batch norms), and then the first rank's are right, as they are for DDP."""
    raw = [name for name, _ in module.named_buffers(remove_duplicate=False)]
    return frozenset(canonical_names(module, raw).values())


def _state_dict(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Mapping[str, Any]:
    """Return the module's ``state_dict``. Where possible its DTensors are the parameters themselves: to detach one
    takes 30 us."""
    if type(module).state_dict is not nn.Module.state_dict or not any(map(is_distributed, parameters.values())):
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
    here = [p for p in parameters.values() if p.numel() and not p.is_meta and not is_distributed(p)]
    trained = {parameter.data_ptr() for parameter in here if parameter.requires_grad}
    return {parameter.data_ptr() for parameter in here} - trained


def _strides(pieces: list[LocalTensor]) -> dict[str, tuple[int, ...]]:
    """Return the strides of the whole tensors that fill their memory in another order than row-major."""
    return {
        piece.spec.name: piece.tensor.stride()
        for piece in pieces
        if not piece.tensor.is_contiguous()  # first, because it is what nearly all tensors are
        and piece.rows is None
        and piece.span is None
        and is_dense(piece.tensor.shape, piece.tensor.stride())
    }


def _sink(component: str, pieces: list[LocalTensor], shards: Mapping[int, LocalShard] = MappingProxyType({})) -> Sink:
    def add(name: str, tensor: torch.Tensor) -> None:
        shard = shards.get(id(tensor))
        pieces.append(piece_of(component, name, tensor) if shard is None else _shard_piece(component, name, shard))

    return add


def piece_of(component: str, name: str, tensor: torch.Tensor, *, frozen: bool = False) -> LocalTensor:
    """Return the tensor, or this rank's rows of it, as one piece. ``frozen``: training does not change it. Raises
    ``UnsupportedValue`` for a tensor that cannot be stored as dense bytes."""
    if is_distributed(tensor) or is_sharded_tensor(tensor):
        return _distributed_piece(component, name, tensor, frozen)
    if type(tensor) not in PLAIN_TYPES or tensor.layout is not torch.strided or tensor.is_meta:
        _check_storable(f"state[{component!r}][{name!r}]", tensor)
    return LocalTensor(_spec(component, name, tensor.dtype, tensor.shape, frozen), tensor)


def _distributed_piece(component: str, name: str, tensor: Any, frozen: bool) -> LocalTensor:
    where = f"state[{component!r}][{name!r}]"
    split = local_rows if is_distributed(tensor) else sharded_tensor_rows
    local = split(tensor, where)
    shape = tensor.shape if is_distributed(tensor) else tensor.metadata().size
    spec = _spec(component, name, local.tensor.dtype, shape, frozen)
    begin = local.first * local.tensor.dtype.itemsize
    gather = tensor.full_tensor if is_distributed(tensor) else None
    return LocalTensor(spec, local.tensor, begin, local.rows, None, local.private, gather, local.redistribute)


def _shard_piece(component: str, name: str, shard: LocalShard) -> LocalTensor:
    spec = _spec(component, name, shard.tensor.dtype, torch.Size(shard.global_shape), False)
    rows = shard.global_shape[0]
    first, count = shard.offsets[0], shard.tensor.shape[0] if shard.tensor.numel() else 0
    return LocalTensor(spec, shard.tensor, spec.nbytes // rows * first if rows else 0, span=(first, first + count))


@functools.lru_cache(maxsize=1 << 20)
def _spec(component: str, name: str, dtype: torch.dtype, shape: torch.Size, frozen: bool) -> TensorSpec:
    """Return the specification of a tensor. It is cached because a training state has the same names and shapes at
    every save, and this runs on the training thread."""
    code = CODES.get(dtype)
    if code is None:
        raise UnsupportedValue(
            f"state[{component!r}][{name!r}]: dtype {dtype} has no safetensors code; convert it (complex128: "
            f"torch.view_as_real; quantized: store int_repr() and the scales)"
        )
    return TensorSpec(name, code, tuple(shape), shape.numel() * dtype.itemsize, frozen)


def _check_storable(where: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise UnsupportedValue(f"{where}: layout {tensor.layout} is not stored; call .to_dense() or store its parts")
    if tensor.is_meta:
        raise UnsupportedValue(f"{where}: a tensor on the meta device has no values to save")
    _check_subclass(tensor, where)


def _check_subclass(tensor: torch.Tensor, where: str) -> None:
    # a subclass that computes or hides its values (a quantized wrapper, say) has no plain bytes to copy
    if getattr(type(tensor), "__torch_dispatch__", None) is not torch.Tensor.__torch_dispatch__:
        raise UnsupportedValue(
            f"{where}: tensors of type {type(tensor).__name__} are not stored by this version; store a plain tensor"
        )
