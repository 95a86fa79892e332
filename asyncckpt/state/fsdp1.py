"""FSDP's first version keeps the parameters of a module in one flat tensor, of which each rank has a run of elements.

An optimizer of it therefore has, on each rank, state for parts of parameters that are no whole rows, and where
``use_orig_params`` is False even for all parameters of a module in one. This module finds which elements of which
parameter lie where, from what FSDP itself knows; nothing here communicates.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asyncckpt.errors import UnsupportedValue
from asyncckpt.state.fqn import canonical_names
from asyncckpt.types import RowOwners


@dataclass(frozen=True, slots=True)
class FlatPart:
    """``FlatPart`` says which elements of a parameter of shape ``shape`` this rank has: ``count`` of them, from the
    row-major element ``first`` on, which lie in the rank's flat tensor from ``offset`` on. ``owners`` says it for all
    ranks; its bounds count elements."""

    component: str
    fqn: str
    shape: tuple[int, ...]
    first: int
    count: int
    offset: int
    owners: RowOwners


@dataclass(frozen=True, slots=True)
class FlatTensor:
    """``FlatTensor`` is this rank's part of an optimizer's state for one parameter."""

    tensor: torch.Tensor
    part: FlatPart


class FlatView:
    """``FlatView`` shows an optimizer of FSDP's first version as one whose parameters have names: ``optimizer`` has a
    parameter for every one of the model, of which it holds this rank's elements, and views of the state.

    ``owners``: the component and FQN of each, by identity. ``parts``: what of it is here, by identity; a parameter that
    this rank has as a whole is not among them."""

    def __init__(
        self, given: torch.optim.Optimizer, flats: Mapping[int, tuple[torch.Tensor, Sequence[FlatPart]]]
    ) -> None:
        self._given = given
        self._flats = flats
        self.owners: dict[int, tuple[str, str]] = {}
        self.parts: dict[int, FlatPart] = {}
        #: The parameters that stand for a flat one, by its identity.
        self._pieces: dict[int, list[torch.Tensor]] = {}
        groups = [
            {**group, "params": [made for one in group["params"] for made in self._parameters(one)]}
            for group in given.param_groups
        ]
        self.optimizer: torch.optim.Optimizer = _StandIn(groups, {})
        for parameter, values in given.state.items():
            if id(parameter) in self._pieces:
                for made in self._pieces[id(parameter)]:
                    part = self.parts[id(made)]
                    if part.count:
                        self.optimizer.state[made] = {
                            key: _part_of_state(value, parameter, part, key) for key, value in values.items()
                        }
            elif id(parameter) not in self.parts or self.parts[id(parameter)].count:
                self.optimizer.state[parameter] = values

    def _parameters(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        """Return what stands for a parameter of the optimizer."""
        flat = self._flats.get(id(parameter))
        if flat is None:
            return [parameter]
        whole, parts = flat
        if whole is not parameter:  # FSDP itself shows the original parameters, and this is one of them
            self.parts[id(parameter)] = parts[0]
            return [parameter]
        made = [whole.detach()[part.offset : part.offset + part.count] for part in parts]
        for one, part in zip(made, parts, strict=True):
            self.parts[id(one)] = part
            self.owners[id(one)] = part.component, part.fqn
        self._pieces[id(parameter)] = made
        return made

    def parts_of_state(self, component: str) -> dict[int, FlatTensor]:
        """Return what the tensors of the state are parts of, by identity. Raises ``UnsupportedValue`` for one that has
        neither as many elements as its parameter nor no dimension, as nobody can say what it is a part of."""
        found: dict[int, FlatTensor] = {}
        for parameter, values in self.optimizer.state.items():
            part = self.parts.get(id(parameter))
            if part is None:
                continue
            for key, value in values.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    if tuple(value.shape) != (part.count,):
                        raise UnsupportedValue(
                            f"state[{component!r}]: {key!r} of parameter {part.fqn} has shape {list(value.shape)}, "
                            f"where FSDP 1 has {part.count} of its elements, so nobody can tell which they are. Use "
                            f"fully_shard (FSDP2), or an optimizer that keeps its state element by element"
                        )
                    found[id(value)] = FlatTensor(value, part)
        return found

    def hand_over(self) -> None:
        """Give the optimizer what the one that stands for it was given. Raises ``ValueError`` where parameters that lie
        in one flat tensor have states that one state cannot be."""
        stand_in, given = self.optimizer, self._given
        for parameter in [one for group in given.param_groups for one in group["params"]]:
            pieces = self._pieces.get(id(parameter))
            if pieces is not None:
                states = [(self.parts[id(one)], stand_in.state[one]) for one in pieces if one in stand_in.state]
                if states:
                    given.state[parameter] = _joined(parameter, states, given.state.get(parameter))
                else:
                    given.state.pop(parameter, None)
            elif parameter in stand_in.state:
                given.state[parameter] = stand_in.state[parameter]
            else:
                given.state.pop(parameter, None)
        everything: dict[Any, Any] = dict(stand_in.state)
        given.state.update({key: one for key, one in everything.items() if not isinstance(key, torch.Tensor)})
        for live, made in zip(given.param_groups, stand_in.param_groups, strict=True):
            live.update({key: value for key, value in made.items() if key != "params"})
        given.__setstate__({"state": given.state, "param_groups": given.param_groups})


class _StandIn(torch.optim.Optimizer):
    """Has the parameters and the state of a ``FlatView``, and never steps."""


def flat_view(component: str, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> FlatView | None:
    """Return a view of an optimizer whose parameters FSDP's first version has flattened; None for any other. The
    modules are those of ``state``. Raises ``UnsupportedValue`` where parameters are split by something else too, and
    for an optimizer that loads with code of its own."""
    kind = _fsdp()
    if kind is None:
        return None
    flats: dict[int, tuple[torch.Tensor, Sequence[FlatPart]]] = {}
    for name, module in state.items():
        if isinstance(module, nn.Module) and is_fsdp1(module):
            flats.update(_flattened(component, name, module, kind))
    used = [one for group in optimizer.param_groups for one in group["params"] if id(one) in flats]
    if not used:
        return None
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        raise UnsupportedValue(
            f"state[{component!r}]: {type(optimizer).__name__} loads with code of its own, which takes no parts of "
            f"parameters as FSDP 1 makes them; use fully_shard (FSDP2)"
        )
    return FlatView(optimizer, flats)


def is_fsdp1(module: nn.Module) -> bool:
    """Return whether a module, or one inside of it, is wrapped by FSDP's first version."""
    kind = _fsdp()
    return kind is not None and any(isinstance(one, kind) for one in module.modules())


@contextlib.contextmanager
def sharded_state_dict(module: nn.Module) -> Iterator[None]:
    """Have ``state_dict`` and ``load_state_dict`` of a module that FSDP's first version wraps deal with each rank's
    part, in the body, where they would deal with whole tensors: files are the same, and no rank holds all of a model.
    Does nothing for other modules, nor where FSDP shards nothing."""
    kind = _fsdp()
    wrapped = [one for one in module.modules() if isinstance(one, kind)] if kind is not None else []
    split = [one for one in wrapped if _handle(one) is not None and _handle(one).uses_sharded_strategy]
    if kind is None or not split:
        yield
        return
    from torch.distributed.fsdp import StateDictType

    if wrapped[0]._state_dict_type != StateDictType.FULL_STATE_DICT:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        before = kind.set_state_dict_type(module, StateDictType.SHARDED_STATE_DICT)
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            kind.set_state_dict_type(
                module, before.state_dict_type, before.state_dict_config, before.optim_state_dict_config
            )


def _fsdp() -> Any:
    """Return the class, or None where nobody has imported it, so that nothing can be one."""
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    return None if module is None else module.FullyShardedDataParallel


def _handle(wrapper: Any) -> Any:
    return wrapper._handle


def _flattened(
    component: str, name: str, module: nn.Module, kind: Any
) -> dict[int, tuple[torch.Tensor, Sequence[FlatPart]]]:
    """Map each parameter that an optimizer of the module may have to the flat parameter that it lies in, and to its
    parts: its own, or of a flat one those of all parameters in it."""
    found: dict[int, tuple[torch.Tensor, Sequence[FlatPart]]] = {}
    for path, wrapper in module.named_modules():
        handle = _handle(wrapper) if isinstance(wrapper, kind) else None
        if handle is None:
            continue
        if getattr(wrapper, "_fsdp_extension", None) is not None:
            raise UnsupportedValue(
                f"state[{component!r}]: parameters of {name!r} are split by FSDP 1 and by tensor parallelism, and only "
                f"FSDP2 (fully_shard) says which elements a rank has of them"
            )
        flat = handle.flat_param
        raw = [f"{path}.{local}" if path else local for local in flat._fqns]
        fqns = canonical_names(module, raw)
        parts = _parts(name, [fqns[one] for one in raw], wrapper, handle)
        if flat._params is None:
            found[id(flat)] = flat, parts
        elif handle.uses_sharded_strategy:  # else each parameter is whole
            found.update({id(one): (flat, (part,)) for one, part in zip(flat._params, parts, strict=True)})
    return found


def _parts(component: str, fqns: Sequence[str], wrapper: Any, handle: Any) -> list[FlatPart]:
    flat = handle.flat_param
    begins = [0, *itertools.accumulate(flat._numels_with_padding)]
    own = [begin for begin, padding in zip(begins, flat._is_padding_mask, strict=False) if not padding]
    ranks = tuple(torch.distributed.get_process_group_ranks(handle.process_group))
    between = getattr(wrapper, "_inter_node_pg", None)
    me = torch.distributed.get_rank()
    # the same part is held by the rank of that number in every group that has the whole parameter
    steps = [one - me for one in torch.distributed.get_process_group_ranks(between)] if between is not None else [0]
    size = flat._sharded_size.numel() if handle.uses_sharded_strategy else sum(flat._numels_with_padding)
    mine = ranks.index(me) if handle.uses_sharded_strategy else 0
    found: list[FlatPart] = []
    for fqn, begin, numel, shape in zip(fqns, own, flat._numels, flat._shapes, strict=True):
        cuts = [(0, numel)]
        held = [(0, tuple(sorted(ranks)))]
        if handle.uses_sharded_strategy:
            edges = [min(max(n * size - begin, 0), numel) for n in range(len(ranks) + 1)]
            cuts = list(itertools.pairwise(edges))
            copies = [tuple(sorted(rank + step for step in steps)) for rank in ranks]
            held = [(low, holders) for (low, high), holders in zip(cuts, copies, strict=True) if low < high]
        low, high = cuts[mine]
        offset = begin + low - mine * size if low < high else 0
        owners = _owners((*(first for first, _ in held), numel), tuple(holders for _, holders in held))
        found.append(FlatPart(component, fqn, tuple(shape), low, high - low, offset, owners))
    return found


@functools.lru_cache(maxsize=1 << 16)
def _owners(bounds: tuple[int, ...], holders: tuple[tuple[int, ...], ...]) -> RowOwners:
    return RowOwners(bounds, holders)


def _part_of_state(value: Any, flat: torch.Tensor, part: FlatPart, key: str) -> Any:
    """Return what one parameter has of a value of the state of the flat one that it lies in."""
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value
    if value.shape != flat.shape:
        raise UnsupportedValue(
            f"{part.fqn}: the optimizer has {key!r} of shape {list(value.shape)} for a flat parameter of "
            f"{flat.numel()} elements, and nobody can tell which elements are whose; use fully_shard (FSDP2)"
        )
    return value[part.offset : part.offset + part.count]


@torch.no_grad()
def _joined(flat: torch.Tensor, states: Sequence[tuple[FlatPart, Mapping[str, Any]]], live: Any) -> dict[str, Any]:
    """Return the state of a flat parameter of those of its parts. Raises ``ValueError``."""
    made: dict[str, Any] = {}
    keys = list(states[0][1])
    for part, values in states:
        if list(values) != keys:
            raise ValueError(f"{part.fqn} has the state {', '.join(values)}, and {states[0][0].fqn} {', '.join(keys)}")
    for key in keys:
        first = states[0][1][key]
        if isinstance(first, torch.Tensor) and first.dim():
            there = live.get(key) if isinstance(live, Mapping) else None
            fits = isinstance(there, torch.Tensor) and there.shape == flat.shape and there.dtype == first.dtype
            whole = there if fits and there is not None else torch.zeros_like(flat, dtype=first.dtype)
            for part, values in states:
                target = whole[part.offset : part.offset + part.count]
                if target.data_ptr() != values[key].data_ptr():
                    target.copy_(values[key])
            made[key] = whole
            continue
        for part, values in states:
            if not _is_equal(values[key], first):
                raise ValueError(
                    f"{key!r} of {part.fqn} differs from that of {states[0][0].fqn}, and FSDP 1 has one for both, as "
                    f"they lie in one flat parameter; wrap it with use_orig_params=True"
                )
        made[key] = first
    return made


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other.to(one.device))
    return type(one) is type(other) and bool(one == other)
