"""A module takes its stored tensors in place. What it takes otherwise, it takes through torch's own loading."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged, StateMismatch
from asyncckpt.jsontree import is_wrapper
from asyncckpt.manifest.records import ComponentRecord, StoredTensor
from asyncckpt.protocols import LiesInFile
from asyncckpt.read.scatter import Window
from asyncckpt.restore.live_memory import refusal
from asyncckpt.restore.memory_format import format_to_be, take_format
from asyncckpt.restore.plain_state import fits_in_place
from asyncckpt.restore.plan import (
    LiveTarget,
    Options,
    RestorePlan,
    StoredTensors,
    decode,
    load,
    mismatch,
    names_of,
    new_tensor,
    same_bits,
)
from asyncckpt.restore.saved_parameters import same_strides
from asyncckpt.restore.shared_memory import raise_shared
from asyncckpt.restore.wrappers import StoredWrappers, not_live, plan_in_module, without_wrappers
from asyncckpt.state.dtensor import is_distributed, is_sharded_tensor
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.state.fqn import canonical_names
from asyncckpt.state.fsdp1 import sharded_state_dict
from asyncckpt.state.wrappers import PLAIN_TYPES, hides_values
from asyncckpt.types import JsonValue


def plan_module(
    name: str,
    module: nn.Module,
    component: ComponentRecord | None,
    stored: StoredTensors,
    extras: JsonValue,
    wrappers: StoredWrappers,
    opts: Options,
) -> RestorePlan:
    """Plan the restore of a module. ``component``: its stored record, where there is one of its name. ``extras``: what
    its ``state_dict`` held beside plain tensors. ``wrappers``: what was stored of tensors that wrap others."""
    plan = RestorePlan()
    extras = without_wrappers(extras)
    with sharded_state_dict(module):
        live = module.state_dict()
    fqns = canonical_names(module, live)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    places = parameters | buffers
    own = {t.untyped_storage().data_ptr() for t in places.values() if _has_memory(t)}
    extra_fill = RestorePlan()
    extra_values: Any = {}
    if extras:
        extra_lives = {fqns[raw]: value for raw, value in live.items() if opts.selected(f"{name}.{fqns[raw]}")}
        extra_values = decode(name, extras, stored, extra_fill, opts, extra_lives)
    plan.mismatched += extra_fill.mismatched
    if isinstance(module, LiesInFile) and isinstance(extra_values, dict):
        problem = module.checkpoint_mismatch(extra_values)
        if problem is not None:
            return RestorePlan(mismatched=[f"{name}: {problem}"])
    if not isinstance(extra_values, dict):
        raise CheckpointDamaged(f"component {name!r} was saved as a module and does not look like one")
    twins_of = functools.cache(lambda: _aliases(live, fqns, places))
    formats = _saved_formats(name, component, stored)
    held = wrappers.of_module(name, stored)
    loaders = _Loaders(module, live)
    later: dict[str, Any] = {}
    meta: dict[str, torch.Tensor] = {}
    formatted: dict[str, torch.Tensor] = {}
    tied: dict[Any, list[tuple[str, StoredTensor, torch.Tensor]]] = {}
    wanted: set[str] = set()
    for raw, value in live.items():
        qualified = f"{name}.{fqns[raw]}"
        if not opts.selected(qualified):
            continue
        wanted.add(qualified)
        found = stored.get(qualified)
        if found is not None and qualified not in formats and not loaders.has_own(raw) and _fills(found, value, own):
            plan.fill.append(LiveTarget(found, Window(value), qualified))
            continue
        if not isinstance(value, torch.Tensor) and not is_sharded_tensor(value):
            if fqns[raw] in extra_values:
                loaders.give(raw, extra_values[fqns[raw]], later)
                plan.read += extra_fill.read
                extra_fill.read = []
            else:
                plan.missing.append(qualified)
            continue
        if is_wrapper(value):
            own_value = parameters.get(raw, buffers.get(raw))  # a class may copy what it wraps for a ``state_dict``
            if is_wrapper(own_value):
                value = own_value
            else:
                later[raw] = value
            twins = [f"{name}.{twin}" for twin in twins_of().get(raw, ())]
            if qualified in held or qualified in stored or not any(twin in held for twin in twins):
                plan_in_module(qualified, value, held.get(qualified), stored.get(qualified), plan)
            continue
        record = found
        if record is None:
            if qualified in held:
                plan.mismatched.append(f"{qualified}: {not_live(held[qualified].node, value)}")
                continue
            # a tied tensor is stored under the name of the one it is tied to
            if not any(f"{name}.{twin}" in stored for twin in twins_of().get(raw, ())):
                plan.missing.append(qualified)
            continue
        problem = mismatch(qualified, record, value, opts)
        if (
            problem
            and refusal(value) is None
            and record.shape != tuple(value.shape)
            and loaders.has_own(raw)
            and not value.is_meta
        ):
            # its own code decides what becomes of a dtype that is not the live one's: nothing is cast before
            dtype = opts.dtype if opts.dtype is not None else DTYPES[record.dtype]
            loaders.give(raw, _new(plan, record, dtype, value.device), later)
            continue
        if problem:
            plan.mismatched.append(problem)
            continue
        if is_distributed(value) or is_sharded_tensor(value):
            if value.device.type == "meta":
                plan.mismatched.append(f"{qualified}: on the meta device; call to_empty(device=...) on the model first")
            else:
                plan.add(record, value, qualified)
                if not is_distributed(parameters.get(raw)):  # FSDP1's state_dict gives copies: it must take them back
                    later[raw] = value
            continue
        saved = formats.get(qualified)
        if value.is_meta:
            dtype = opts.dtype if opts.dtype is not None and value.is_floating_point() else value.dtype
            if raw not in places:
                plan.mismatched.append(f"{qualified}: on the meta device, and neither a parameter nor a buffer")
                continue
            meta[raw] = _new(plan, record, dtype, opts.device, saved)
            tied.setdefault(id(places[raw]), []).append((qualified, record, meta[raw]))
            continue
        if value.numel() and value.untyped_storage().data_ptr() not in own:
            later[raw] = value  # the module's state_dict gives copies (hooks, packed weights): it must take them back
        elif saved is not None and not same_strides(record.shape, format_to_be(value, saved), value.stride()):
            formatted[raw] = _new(plan, record, value.dtype, value.device, saved)
            tied.setdefault(value.data_ptr(), []).append((qualified, record, formatted[raw]))
            continue
        elif loaders.has_own(raw):
            loaders.give(raw, value, later)
        plan.add(record, value, qualified)
    wanted.update(f"{name}.{key}" for key in jsontree.tensor_names(extras))
    wanted.update(f"{key}.{path}" for key, one in held.items() if key in wanted for path in one.inside)
    plan.unexpected += [key for key in names_of(name, stored) if key not in wanted and opts.selected(key)]
    if meta:
        plan.finish.append(lambda: _materialize(module, meta))
    empty = _left_on_meta(name, module, live, places, opts)
    if empty:
        plan.missing += empty
        plan.notes.append(
            f"on the meta device, and never saved (persistent=False): {', '.join(empty[:20])}. Give it values before "
            f"restoring: make it outside torch.device('meta'), or call to_empty(device=...) on the module and what "
            f"computes it; or restore with strict=False, and do so afterwards"
        )
    plan.checks += [functools.partial(_check_tied, group) for group in tied.values() if len(group) > 1]
    if formatted:
        plan.finish.append(lambda: take_format(module, formatted))
    if later:  # torch asks every part of the module to load: those with code of their own need all that is theirs
        later |= loaders.given()
        plan.finish.append(lambda: load(name, lambda: _load(module, later)))
    else:
        plan.finish += [functools.partial(load, name, owner.run) for owner in loaders.owners.values() if owner.values]
    return plan


def _load(module: nn.Module, values: Mapping[str, Any]) -> None:
    with sharded_state_dict(module):
        module.load_state_dict(values, strict=False)


def _new(
    plan: RestorePlan,
    record: StoredTensor,
    dtype: torch.dtype,
    device: torch.device,
    strides: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Make a tensor that ``plan`` fills with a stored one; values of another kind keep their dtype."""
    stored = DTYPES[record.dtype]
    kept = dtype if dtype.is_floating_point and stored.is_floating_point else stored
    tensor = new_tensor(record, kept, device, strides)
    plan.read.append((record, [Window(tensor)]))
    return tensor


def _has_memory(tensor: torch.Tensor) -> bool:
    if type(tensor) in PLAIN_TYPES:
        return not tensor.is_meta and tensor.layout is torch.strided
    return not (tensor.is_meta or is_distributed(tensor) or is_lazy(tensor) or hides_values(tensor))


def _fills(record: StoredTensor, live: Any, own: AbstractSet[int]) -> bool:
    """Return whether a live value takes a stored tensor in place, in memory of the module's own, and nothing else has
    to be looked at. ``own``: the addresses of that memory."""
    return fits_in_place(record, live) and (not live.numel() or live.untyped_storage().data_ptr() in own)


def _left_on_meta(
    name: str, module: nn.Module, live: Mapping[str, Any], there: Mapping[str, torch.Tensor], opts: Options
) -> list[str]:
    """Return the qualified names of tensors on the meta device that nothing stored can fill, because ``state_dict``
    does not give them: buffers that are not persistent, say. ``live``: what it does give. ``there``: all of the
    module's parameters and buffers."""
    empty = [raw for raw, one in there.items() if raw not in live and not is_lazy(one) and one.is_meta]
    names = [f"{name}.{fqn}" for fqn in canonical_names(module, empty).values()]
    return [qualified for qualified in names if opts.selected(qualified)]


def _check_tied(group: Sequence[tuple[str, StoredTensor, torch.Tensor]]) -> None:
    """Refuse different values for one live tensor that takes new memory. Raises ``StateMismatch``."""
    (name, record, value), *others = group
    for other, its_record, its_value in others:
        if its_record is not record and not same_bits(value, its_value):
            raise_shared(name, [other])


def _saved_formats(name: str, component: ComponentRecord | None, stored: StoredTensors) -> dict[str, tuple[int, ...]]:
    """Return the strides of the stored tensors that were not row-major, by their live names."""
    if component is None or not component.strides:
        return {}
    by_record = {id(component.tensors[key]): strides for key, strides in component.strides.items()}
    found = ((key, id(stored[key])) for key in names_of(name, stored))
    return {key: by_record[record] for key, record in found if record in by_record}


@dataclass(slots=True)
class _Owner:
    """``_Owner`` is a part of a module that loads its tensors with code of its own, and what it is given."""

    module: nn.Module
    prefix: str
    metadata: Any
    values: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Have the part load what it is given, without its children, as ``load_state_dict`` does for each part."""
        errors: list[str] = []
        unexpected: list[str] = []
        values = OrderedDict(self.values)
        with torch.no_grad():
            self.module._load_from_state_dict(values, self.prefix, self.metadata, True, [], unexpected, errors)
        if errors:
            raise StateMismatch("; ".join(errors))
        for hook in self.module._load_state_dict_post_hooks.values():
            hook(self.module, torch.nn.modules.module._IncompatibleKeys([], unexpected))


class _Loaders:
    """Finds the parts of a module that load with code of their own: an override of ``_load_from_state_dict``, or a
    hook. Torch's own layers, whose code is for checkpoints of older versions, are not among them."""

    def __init__(self, module: nn.Module, live: Mapping[str, Any]) -> None:
        self._metadata = getattr(live, "_metadata", {})
        self.owners = {
            path: _Owner(part, f"{path}." if path else "", self._metadata.get(path, {}))
            for path, part in module.named_modules(remove_duplicate=False)
            if _loads_itself(part)
        }

    def has_own(self, raw: str) -> bool:
        """Return whether the tensor with this ``state_dict`` key belongs to such a part."""
        return bool(self.owners) and raw.rpartition(".")[0] in self.owners

    def give(self, raw: str, value: Any, otherwise: dict[str, Any]) -> None:
        """Give a value to the part that it belongs to; where that has no code of its own, add it to ``otherwise``."""
        owner = self.owners.get(raw.rpartition(".")[0])
        (otherwise if owner is None else owner.values)[raw] = value

    def given(self) -> dict[str, Any]:
        """Return all that was given, by ``state_dict`` key."""
        return {raw: value for owner in self.owners.values() for raw, value in owner.values.items()}


def _loads_itself(part: nn.Module) -> bool:
    if part._load_state_dict_pre_hooks or part._load_state_dict_post_hooks:
        return not isinstance(part, nn.modules.lazy.LazyModuleMixin)
    method = type(part)._load_from_state_dict
    return method is not nn.Module._load_from_state_dict and not method.__module__.startswith("torch.nn.modules.")


def _aliases(
    live: Mapping[str, Any], fqns: Mapping[str, str], places: Mapping[str, torch.Tensor]
) -> dict[str, list[str]]:
    """Map each raw name to the FQNs of the other live tensors in the same memory. ``places``: the parameters and
    buffers."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for raw, value in live.items():
        if not isinstance(value, torch.Tensor):
            continue
        if is_wrapper(value):
            if raw in places:
                groups.setdefault((id(places[raw]),), []).append(raw)
        elif is_distributed(value) or is_sharded_tensor(value):
            # this rank's part may be empty and have no memory: the parameter tells them apart
            groups.setdefault((id(places.get(raw)),), []).append(raw)
        elif is_lazy(value) or (value.is_meta and raw not in places):
            continue
        elif value.is_meta:
            groups.setdefault((id(places[raw]),), []).append(raw)
        elif value.numel():
            groups.setdefault((value.data_ptr(), value.shape, value.stride(), value.device), []).append(raw)
    return {raw: [fqns[other] for other in group if other != raw] for group in groups.values() for raw in group}


def _materialize(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give tensors on the meta device their storage. They are swapped in place: ties and optimizers keep their
    objects."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    swap: Callable[[torch.Tensor, torch.Tensor], None] = torch.utils.swap_tensors
    made: dict[int, torch.Tensor] = {}
    for raw, value in values.items():
        if raw in parameters:
            live = parameters[raw]
            if made.setdefault(id(live), value) is value:
                swap(live, nn.Parameter(value, requires_grad=live.requires_grad))
        elif raw in buffers:
            made.setdefault(id(buffers[raw]), value)
    for raw, buffer in buffers.items():
        if id(buffer) in made:
            owner = module.get_submodule(raw.rpartition(".")[0])
            owner._buffers[raw.rpartition(".")[2]] = made[id(buffer)]
