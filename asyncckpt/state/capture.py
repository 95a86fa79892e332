"""``capture`` turns live objects into a flat ``Snapshot``: names, references to tensors, and copies of plain values.

How a component is captured depends on its type: an ``nn.Module`` by its ``state_dict``, an optimizer by its state keyed
by parameter name, any other object that has ``state_dict`` and ``load_state_dict`` by those, a tensor as itself, and
everything else as plain data. No tensor is copied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from asyncckpt import jsontree
from asyncckpt.errors import InvalidOption
from asyncckpt.protocols import Stateful
from asyncckpt.state.class_names import class_name
from asyncckpt.state.fqn import parameter_names
from asyncckpt.state.fsdp1 import flat_view
from asyncckpt.state.kept import KeptCaptures, keep_state
from asyncckpt.state.markers import LocalShard, Replicated, without_owners, without_shards
from asyncckpt.state.modules import capture_module
from asyncckpt.state.optimizer import (
    group_parameters,
    named_optimizer_state,
    object_state,
    rename_group_tensors,
)
from asyncckpt.state.pieces import sink, strides_of
from asyncckpt.state.zero_redundancy import local_optimizer
from asyncckpt.types import ComponentSnapshot, LocalTensor, Snapshot

#: Names of components become file names; ``manifest/parse.py`` checks them when they are read.
#: A name has no dots: tensors are named ``component.fqn``, and ``a.b`` + ``c`` must differ from ``a`` + ``b.c``.
_COMPONENT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_=+-]{0,199}\Z")
#: In a job, what a rank has of its own is stored under such a name; checkpoints that have one are read all the same.
_OF_A_RANK = re.compile(r"\+[0-9]+\Z")
_RESERVED = frozenset({"state", "manifest", "latest"})


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
        components = [capture_module(name, module, parameters[name], kept) for name, module in modules.items()]
    else:
        names = parameter_names(modules, parameters)
        components = [
            capture_module(name, value, parameters[name], kept)
            if name in modules
            else _component(name, value, state, names, kept)
            for name, value in state.items()
        ]
    _check_files(components)
    for component in components:
        if component.name in owners:
            component.shared, component.owner = True, owners[component.name]
    return Snapshot(step, components)


def _check_files(components: Sequence[ComponentSnapshot]) -> None:
    """Raise ``InvalidOption`` where two components have to lie in one file."""
    found: dict[str, str] = {}
    for component in components:
        file = component.pieces[0].spec.file.casefold() if component.pieces else ""
        other = found.setdefault(file, component.name) if file else component.name
        if other != component.name:
            raise InvalidOption(
                f"components {other!r} and {component.name!r} both have to lie in {component.pieces[0].spec.file}: "
                f"leave one out"
            )


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


def _component(
    name: str, value: Any, state: Mapping[str, Any], owners: Mapping[int, tuple[str, str]], kept: KeptCaptures
) -> ComponentSnapshot:
    if kind_of(value) == "optimizer":
        return _optimizer(name, value, state, owners, kept)
    return other_component(name, value)


def other_component(name: str, value: Any) -> ComponentSnapshot:
    """Capture a component that is neither a module nor an optimizer."""
    kind = kind_of(value)
    type_name = class_name(value) if kind == "stateful" else ""
    pieces: list[LocalTensor] = []
    shared = kind == "tensor" or isinstance(value, Replicated)
    if kind == "stateful":
        value = value.state_dict()
    shards: dict[int, LocalShard] = {}
    value = without_shards(value, shards)
    tree = jsontree.encode(value, "", sink(name, pieces, shards), component=name)
    shared = shared or any(piece.rows is not None or piece.span is not None for piece in pieces)
    return ComponentSnapshot(name, kind, pieces, {}, tree, shared, type_name, strides_of(pieces))


def _optimizer(
    name: str,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    owners: Mapping[int, tuple[str, str]],
    kept: KeptCaptures,
) -> ComponentSnapshot:
    type_name = class_name(local_optimizer(name, optimizer))
    view = flat_view(name, optimizer, state)
    if view is None:
        kind, value = named_optimizer_state(name, optimizer, owners, state)
    else:
        kind, value = named_optimizer_state(name, view.optimizer, {**owners, **view.owners}, state)
    parts = view.parts_of_state(name) if view is not None else {}
    pieces: list[LocalTensor] = []
    # where there is more beside these two, names of tensors may depend on it
    keepable = view is None and kind == "optimizer" and list(value) == ["state", "param_groups"]
    known = kept.states.get(name) if keepable else None
    found = known.pieces(value["state"]) if known is not None else None
    if known is not None and found is not None:
        pieces += found
        value = {**value, "state": jsontree.Encoded(known.tree)}
    tree: Any = jsontree.encode(value, "", sink(name, pieces, parts), component=name, objects=object_state)
    if keepable and found is None:
        of_state = [piece for piece in pieces if piece.spec.name.startswith("state.")]
        made = keep_state(value["state"], of_state, tree["state"])
        kept.states.pop(name, None)
        if made is not None:
            kept.states[name] = made
    if kind == "optimizer":
        rename_group_tensors(tree, pieces)
    snapshot = ComponentSnapshot(name, kind, pieces, {}, tree, True, type_name, strides_of(pieces))
    if kind == "optimizer":
        snapshot.parameters = group_parameters(tree)
    return snapshot
