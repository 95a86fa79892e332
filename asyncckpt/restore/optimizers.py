"""An optimizer takes its stored state by the names of its parameters, bit for bit."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace as replaced
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.manifest.records import ComponentRecord
from asyncckpt.restore.live_memory import NOT_INITIALISED
from asyncckpt.restore.memory_format import format_to_be
from asyncckpt.restore.optimizer_load import (
    CannotMake,
    RestoredState,
    install,
    load_exactly,
    load_whole,
    loads_as_torch_does,
    make_object,
    make_own,
    parameters_of,
)
from asyncckpt.restore.optimizer_state import StateTargets
from asyncckpt.restore.param_groups import hyper_parameters, sources_of
from asyncckpt.restore.plain_state import PlainStates
from asyncckpt.restore.plan import (
    Options,
    QualifiedRecords,
    RestorePlan,
    StoredTensors,
    decode_like,
    load,
    on_host,
)
from asyncckpt.restore.saved_parameters import SavedParameter, SavedParameters
from asyncckpt.restore.wrappers import DoesNotFit
from asyncckpt.state.class_names import class_name
from asyncckpt.state.dtensor import job_size
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.state.fqn import parameter_names
from asyncckpt.state.fsdp1 import flat_view
from asyncckpt.state.optimizer import TORCH_KEYS, grouped, optimizer_names
from asyncckpt.state.zero_redundancy import after_restore, local_optimizer
from asyncckpt.types import JsonValue


def plan_optimizer(
    name: str,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    record: ComponentRecord,
    tree: JsonValue,
    saved: SavedParameters,
    opts: Options,
) -> RestorePlan:
    """Plan the restore of an optimizer whose parameters are those of ``state``. Its tensors are found by their stored
    names, whatever ``rename`` says of those: the parameters that they belong to are renamed."""
    if not opts.selected(name):
        return RestorePlan()
    return _OptimizerPlanner(name, optimizer, state, record, saved, opts).plan(tree)


class _OptimizerPlanner:
    """Plans the restore of one optimizer. ``plan`` is the only entry, and is called once."""

    def __init__(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        record: ComponentRecord,
        saved: SavedParameters,
        opts: Options,
    ) -> None:
        self._name = name
        self._given = optimizer
        view = flat_view(name, optimizer, state)
        self._hand_over = view.hand_over if view is not None else None
        self._flat_parts = view.parts if view is not None else {}
        self._optimizer = local_optimizer(name, optimizer) if view is None else view.optimizer
        self._record = record
        self._saved = saved
        self._opts = opts
        self._stored: StoredTensors = QualifiedRecords({name: replaced(record, aliases={})})
        self._plain = PlainStates(name, record, opts)
        self._targets = StateTargets(name, record, self._stored, opts, self._format_to_be)
        owners = parameter_names({key: value for key, value in state.items() if isinstance(value, nn.Module)})
        owners |= view.owners if view is not None else {}
        whole = optimizer if view is None else view.optimizer
        names = optimizer_names(name, self._optimizer, owners, state, whole=whole)
        self._labels = [label for label, _, _ in names]
        self._index_of_label = {label: index for index, label in enumerate(self._labels)}
        self._index_of_place = {(holder, fqn): index for index, (_, holder, fqn) in enumerate(names)}
        self._parameters = parameters_of(self._optimizer)
        self._lazy = [label for label, one in zip(self._labels, self._parameters, strict=True) if is_lazy(one)]
        self._group_tensors = [key for key in record.tensors if key.startswith("param_groups.")]
        self._plan = RestorePlan()

    def plan(self, tree: JsonValue) -> RestorePlan:
        live = class_name(self._given if self._hand_over else self._optimizer)
        stored = self._record.type_name
        if stored and live and stored.rpartition(".")[2] != live.rpartition(".")[2]:
            self._plan.mismatched.append(f"{self._name}: saved as {stored}, live {live}: its state means another thing")
        elif self._lazy:
            self._plan.mismatched += [f"{self._name}.{label}: {NOT_INITIALISED}" for label in self._lazy]
        elif not isinstance(tree, dict):
            self._damaged("was saved as an optimizer and does not look like one")
        elif self._record.kind == "stateful":
            self._plan_whole(tree)
        else:
            self._plan_by_name(tree)
        if self._plan.finish and self._hand_over is not None:
            hand_over = self._hand_over
            self._plan.finish.append(lambda: load(self._name, hand_over))
        elif self._plan.finish:
            self._plan.finish.append(lambda: after_restore(self._given))
        return self._plan

    def _damaged(self, problem: str) -> None:
        raise CheckpointDamaged(f"component {self._name!r} {problem}")

    def _plan_by_name(self, tree: dict[str, JsonValue]) -> None:
        plan, name = self._plan, self._name
        group_trees, states = tree.get("param_groups"), tree.get("state")
        if not isinstance(group_trees, list):
            self._damaged("was saved as an optimizer and does not look like one")
        elif not isinstance(states, dict) or "$" in states:
            self._damaged("was saved as an optimizer, and its state is not keyed by parameter name")
        else:
            labels = [self._labels_of(group) for group in group_trees]
            places = self._places([label for group in labels for label in group])
            new = RestoredState(groups=self._groups(group_trees, labels, places))
            hyperparameters = [group for group, live in zip(new.groups, self._live_groups(), strict=True) for _ in live]
            new.kept = set(range(len(self._labels))) - {index for index, _ in places.values()}
            for label, (index, parameter) in places.items():
                self._add_state(new, label, index, parameter, states.get(label), hyperparameters[index])
            known = {label for group in labels for label in group}
            rest = {key: item for key, item in states.items() if key not in known}
            new.others = {key: self._decode(item, f"state.{key}", self._live_state(key)) for key, item in rest.items()}
            extra = {key: item for key, item in tree.items() if key not in TORCH_KEYS}
            types = self._types(extra) or {}
            new.extra = {key: self._decode(item, key, None, types.get(key)) for key, item in extra.items()}
            if (new.others or new.extra) and not loads_as_torch_does(self._optimizer):
                self._require_order(labels, places)
            if loads_as_torch_does(self._optimizer):
                plan.finish.append(lambda: load(name, lambda: install(self._optimizer, new)))
            else:
                plan.finish.append(lambda: load_exactly(name, self._optimizer, new))

    def _live_groups(self) -> list[list[str]]:
        return grouped(self._labels, self._optimizer)

    def _live_state(self, key: str) -> Any:
        state = getattr(self._optimizer, "state", {})
        return state.get(key) if isinstance(state, Mapping) else None

    def _labels_of(self, group: JsonValue) -> list[str]:
        names = group.get("params") if isinstance(group, dict) else None
        found = [label for label in names if isinstance(label, str)] if isinstance(names, list) else []
        if not isinstance(group, dict) or "$" in group or not isinstance(names, list) or len(found) != len(names):
            self._damaged("has a param group that does not look like one")
        return found

    def _places(self, labels: list[str]) -> dict[str, tuple[int, SavedParameter | None]]:
        """Map each stored name to the index of the live parameter that it stands for, and to what was stored of that.
        What has no counterpart is reported."""
        places: dict[str, tuple[int, SavedParameter | None]] = {}
        taken: set[int] = set()
        for label in labels:
            candidates, dropped = self._saved.find(label)
            hits = [(self._index_of_place.get((one.component, one.fqn)), one) for one in candidates]
            index, parameter = next(((i, one) for i, one in hits if i is not None and i not in taken), (None, None))
            if index is None and not candidates and not dropped:
                index = self._index_of_label.get(label)
            if index is not None and index not in taken:
                taken.add(index)
                places[label] = index, parameter
            elif not dropped:
                self._plan.unexpected.append(f"{self._name}.{label}")
        self._plan.missing += [f"{self._name}.{one}" for i, one in enumerate(self._labels) if i not in taken]
        return places

    def _groups(
        self,
        trees: list[JsonValue],
        labels: list[list[str]],
        places: Mapping[str, tuple[int, SavedParameter | None]],
    ) -> list[dict[str, Any]]:
        """Return the hyperparameters of each live group: those that its parameters were saved with. A live group keeps
        what was not saved."""
        live_groups = self._optimizer.param_groups
        if len(trees) != len(live_groups) and self._opts.saved_ranks == job_size() == 1:
            self._plan.mismatched.append(
                f"{self._name}: {len(trees)} param groups saved, {len(live_groups)} in the live optimizer"
            )
        stored_as = {index: label for label, (index, _) in places.items()}
        edges = itertools.pairwise([0, *itertools.accumulate(len(live["params"]) for live in live_groups)])
        members = [[stored_as[index] for index in range(*ends) if index in stored_as] for ends in edges]
        sources, differing = sources_of(self._name, members, trees)
        self._plan.mismatched += differing
        made: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        for live, source in zip(live_groups, sources, strict=True):
            kept = {key: value for key, value in live.items() if key != "params"}
            if source is None:
                groups.append(kept)
                continue
            if source not in made:
                first = labels[source][0]
                place = f"param_groups.{first if self._names_groups(first) else source}"
                made[source] = hyper_parameters(self._decode(trees[source], place, kept))
                groups.append({**kept, **made[source]})
            else:
                groups.append({**kept, **made[source]})
                self._plan.finish.append(functools.partial(make_own, groups[-1]))
        return groups

    def _names_groups(self, first: str) -> bool:
        """Whether the tensors of a stored group go by the name of its first parameter; in checkpoints that are older
        than that, they go by its number."""
        return any(key.startswith(f"param_groups.{first}.") for key in self._group_tensors)

    def _add_state(
        self,
        new: RestoredState,
        label: str,
        index: int,
        saved: SavedParameter | None,
        tree: JsonValue,
        group: Mapping[str, Any],
    ) -> None:
        """Plan the state of one parameter, or report why it cannot be its state."""
        where, parameter = f"{self._name}.{self._labels[index]}", self._parameters[index]
        part = self._flat_parts.get(id(parameter))
        problem = self._misfit(saved, parameter)
        if problem is None and part is not None and not part.count:
            return  # torch's optimizers have no state for it on this rank
        live = self._optimizer.state.get(parameter) if isinstance(self._optimizer.state, Mapping) else None
        if problem is None and part is None:
            plain = self._plain.plan(label, parameter, saved, tree, live, group, self._plan)
            if plain is not None:
                new.states[index] = plain
                if live:
                    new.in_place.add(index)
                return
        if problem is None and isinstance(tree, dict) and "$" not in tree and isinstance(live, dict):
            mine, theirs = {str(key) for key in live}, set(tree)
            if mine - theirs and theirs - mine:
                problem = f"saved with the state {', '.join(sorted(theirs))}, live with {', '.join(sorted(mine))}"
        if problem is None and tree is not None:
            plan = RestorePlan(used=self._plan.used)
            get = self._targets.of_parameter(parameter, saved, live, f"state.{label}", group, plan, part)
            host = on_host(self._name, self._stored, plan)
            try:
                made = self._objects(plan), self._wrappers(parameter.device, plan)
                new.states[index] = decode_like(where, tree, live, get, host, plan, *made)
            except (CannotMake, DoesNotFit) as error:
                problem = str(error)
            else:
                self._plan.merge(plan)
        if problem is not None:
            new.kept.add(index)
            self._plan.mismatched.append(f"{where}: {problem}")

    def _misfit(self, saved: SavedParameter | None, parameter: torch.Tensor) -> str | None:
        if saved is None:
            return None
        part = self._flat_parts.get(id(parameter))
        shape = tuple(parameter.shape) if part is None else part.shape
        if saved.record.shape != shape:
            shapes = f"{list(saved.record.shape)}, live {list(shape)}"
            return f"saved as the state of a parameter of shape {shapes}"
        dtype = DTYPES[saved.record.dtype]
        if dtype == parameter.dtype or parameter.is_meta or self._opts.dtype == parameter.dtype:
            return None
        way_out = f"(restore(..., dtype={parameter.dtype}) converts)"
        return f"saved as the state of a {dtype} parameter, live {parameter.dtype} {way_out}"

    def _format_to_be(self, saved: SavedParameter | None, parameter: torch.Tensor) -> tuple[int, ...]:
        if saved is None or not self._opts.selected(f"{saved.component}.{saved.fqn}"):
            return format_to_be(parameter, None)
        return format_to_be(parameter, saved.strides if saved.fqn else None)

    def _objects(self, plan: RestorePlan) -> Callable[[Any, str, Any], Any]:
        return lambda live, kind, state: make_object(self._optimizer, live, kind, state, plan.finish)

    def _wrappers(self, device: torch.device, plan: RestorePlan) -> Callable[[jsontree.Wrapper, Any, str], Any]:
        there = self._opts.device if device.type == "meta" else device
        return self._targets.wrappers(self._optimizer, there, plan)

    def _types(self, tree: JsonValue) -> Any:
        """Return the live ``state_dict`` where the tree of one holds values that only a live one gives their types."""
        return self._optimizer.state_dict() if jsontree.needs_live(tree) else None

    def _decode(self, tree: JsonValue, prefix: str, live: Any, types: Any = None) -> Any:
        """Decode values that are no parameter's state, into the tensors of ``live`` where they fit, and into its types.
        Where the tensors are to be new ones, ``types`` alone is given."""
        plan = self._plan
        device = self._parameters[0].device if self._parameters else self._opts.device
        get = self._targets.elsewhere(live, prefix, plan, self._opts.device if device.type == "meta" else device)
        try:
            host, where = on_host(self._name, self._stored, plan), f"{self._name}.{prefix}"
            made = self._objects(plan), self._wrappers(device, plan)
            return decode_like(where, tree, types if live is None else live, get, host, plan, *made)
        except (CannotMake, DoesNotFit) as error:
            plan.mismatched.append(f"{self._name}: {error}")
            return {}

    def _require_order(self, labels: list[list[str]], places: Mapping[str, tuple[int, SavedParameter | None]]) -> None:
        """Report where parameters come in another order than they were saved in, for a class that has state which goes
        by their positions."""
        saved = [places[label][0] if label in places else None for group in labels for label in group]
        if saved != list(range(len(self._labels))) or list(map(len, labels)) != list(map(len, self._live_groups())):
            self._plan.mismatched.append(
                f"{self._name}: {class_name(self._optimizer)} may store state by the positions of parameters, and they "
                f"come in another order than they were saved in"
            )

    def _plan_whole(self, tree: dict[str, JsonValue]) -> None:
        """Plan an optimizer whose ``state_dict`` has a form of its own."""
        plan, name = self._plan, self._name
        labels = tree.get("param_names")
        if tree.keys() != {"state_dict", "param_names"} or not isinstance(labels, list):
            plan.mismatched.append(f"{name}: saved as an object with a state of its own, live as an optimizer")
            return
        groups = [[str(label) for label in group] if isinstance(group, list) else [] for group in labels]
        places = self._places([label for group in groups for label in group])
        self._require_order(groups, places)
        for label, (index, saved) in places.items():
            problem = self._misfit(saved, self._parameters[index])
            if problem:
                plan.mismatched.append(f"{name}.{label}: {problem}")
        if plan.mismatched or plan.missing or plan.unexpected:
            return
        given = self._decode(tree["state_dict"], "state_dict", None, self._types(tree["state_dict"]))
        plan.finish.append(lambda: load_whole(name, self._optimizer, given))
