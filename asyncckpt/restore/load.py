"""Loads what was saved as plain containers and tensors, without live objects, or into those that the caller gives."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged, InvalidOption, StateMismatch, UnknownName
from asyncckpt.manifest.records import ComponentRecord, StoredTensor
from asyncckpt.memory.gc_pause import gc_paused
from asyncckpt.memory.tensor_bytes import is_dense
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.restore.carrying_out import Planned, Stages
from asyncckpt.restore.changes import Changes
from asyncckpt.restore.plan import RestorePlan, describe, find_tensor, new_tensor, on_host, qualified_records
from asyncckpt.restore.wrappers import fill_or_note
from asyncckpt.state.dtensor import is_distributed
from asyncckpt.state.dtensor import like as distributed_like
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.state.wrappers import hides_values
from asyncckpt.types import JsonValue

_WAY_OUT = "Give load a like= that has what was saved; None at a place takes whatever was saved there."
#: Trees with these tags list keys and values in turn.
_MAPPINGS = frozenset({"dict", "OrderedDict", "Counter", "defaultdict", "Namespace", "SimpleNamespace"})
_SEQUENCES = frozenset({"tuple", "deque"})


@gc_paused()
def load(
    checkpoint: OpenCheckpoint,
    component: str | None,
    like: Any,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    expect_digest: str | None = None,
) -> Any:
    """Read one component, or all of them by name; see ``Run.load``."""
    checkpoint.require_digest(expect_digest)
    components, trees = checkpoint.manifest.components, checkpoint.trees
    if component is None and like is not None and not isinstance(like, Mapping):
        raise InvalidOption(
            f"load takes a like= of components by name, or with component= of that one, not {like!r:.80}"
        )
    chosen = [component] if component is not None else list(components if like is None else like)
    for name in chosen:
        if name not in components:
            alike = difflib.get_close_matches(str(name), components, n=1)
            hint = f"; is it {alike[0]!r}?" if alike else ""
            known = ", ".join(components)
            raise UnknownName(f"{checkpoint.path}: no component {name!r:.80}; there are {known}{hint}")
    lives = {name: like if component is not None or like is None else like[name] for name in chosen}
    changes = Changes()
    changes.expect(chosen)
    planned, plan = Planned(lives, changes), RestorePlan()
    found: dict[str, Any] = {}
    for name, live in lives.items():
        tree = trees.get(name, {} if components[name].kind == "module" else None)
        part = _Loader(name, components[name], tree, live, device, dtype)
        found[name] = part.value()
        planned.add(name, part.plan)
    planned.prepare()
    for part_plan in planned.plans:
        plan.merge(part_plan)
    if plan.missing or plan.mismatched:
        where = f"{checkpoint.path} (step {checkpoint.manifest.step})"
        raise StateMismatch(describe(where, plan, "like", _WAY_OUT), plan.missing, (), plan.mismatched)
    with changes.told():
        planned.carry_out(checkpoint, Stages())
    return found if component is None else found[component]


class _Loader:
    """Plans the loading of one component. ``value`` is the only entry, and is called once; what it returns has its
    values once ``plan`` was carried out."""

    def __init__(
        self,
        name: str,
        record: ComponentRecord,
        tree: JsonValue,
        like: Any,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self._name = name
        self._record = record
        self._tree = _module_tree(name, record, tree) if record.kind == "module" else tree
        self._like = like
        self._device = device
        self._dtype = dtype
        self._stored = dict(qualified_records({name: record}))
        #: What is inside of a tensor that wraps others is of no use in another dtype.
        self._exact = set(_names_inside(self._tree))
        #: New tensors by the record that they take: tied names share one.
        self._new: dict[int, torch.Tensor] = {}
        self.plan = RestorePlan()

    def value(self) -> Any:
        if isinstance(self._like, torch.nn.Module | torch.optim.Optimizer):
            raise InvalidOption(
                f"load takes containers and tensors as like=, not a {type(self._like).__name__} ({self._name}): call "
                f"restore, which fills it, or give its state_dict()"
            )
        tree = self._chosen(self._tree, self._like, self._name)
        live = jsontree.Live(self._like)
        wrappers = fill_or_note(self._name, self._stored, self.plan, plain=True)
        arrays = on_host(self._name, self._stored, self.plan)
        found = jsontree.decode(tree, _unused, arrays, live, wrappers=wrappers, places=self._tensor)
        self.plan.mismatched += [f"{self._name}{problem}" for problem in live.mismatched]
        return found

    def _chosen(self, tree: JsonValue, like: Any, path: str) -> JsonValue:
        """Return the part of a tree that ``like`` has. What does not fit is noted, and stays."""
        if like is None:
            return tree
        if isinstance(tree, list):
            return self._items(tree, like, path)
        if not isinstance(tree, dict):
            if isinstance(like, torch.Tensor):
                self._note(path, f"saved as a {type(tree).__name__}, like has a tensor")
            return tree
        tag, items = tree.get("$"), tree.get("v")
        if tag is None:
            return self._keys(tree, like, path)
        if tag in _MAPPINGS and isinstance(items, list):
            there = vars(like) if type(like).__name__ in ("Namespace", "SimpleNamespace") else like
            if not isinstance(there, Mapping):
                self._note(path, f"saved as a {tag}, like has a {type(like).__name__}")
                return tree
            keys = [_key(key) for key in items[::2]]
            self.plan.missing += [f"{path}.{key}" for key in there if key not in keys]
            flat: list[JsonValue] = []
            for key, text, item in zip(keys, items[::2], items[1::2], strict=False):
                if key in there:
                    flat += [text, self._chosen(item, there[key], f"{path}.{key}")]
            return {**tree, "v": flat}
        if tag in _SEQUENCES and isinstance(items, list):
            return {**tree, "v": self._items(items, like, path)}
        if isinstance(like, torch.Tensor) and tag not in ("tensor", "wrapper"):
            self._note(path, f"saved as a {tag}, like has a tensor")
        return tree

    def _keys(self, tree: dict[str, JsonValue], like: Any, path: str) -> JsonValue:
        if not isinstance(like, Mapping):
            self._note(path, f"saved as a dict, like has a {type(like).__name__}")
            return tree
        self.plan.missing += [f"{path}.{key}" for key in like if key not in tree]
        return {key: self._chosen(item, like[key], f"{path}.{key}") for key, item in tree.items() if key in like}

    def _items(self, tree: list[JsonValue], like: Any, path: str) -> list[JsonValue]:
        if not isinstance(like, Sequence) or isinstance(like, str | bytes) or len(like) != len(tree):
            has = f"{len(like)}" if isinstance(like, Sequence) else f"a {type(like).__name__}"
            self._note(path, f"saved as {len(tree)} items, like has {has}")
            return tree
        return [self._chosen(item, mine, f"{path}.{n}") for n, (item, mine) in enumerate(zip(tree, like, strict=True))]

    def _note(self, path: str, why: str) -> None:
        self.plan.mismatched.append(f"{path}: {why}")

    def _tensor(self, key: str, live: Any) -> torch.Tensor:
        """Return the tensor that takes the stored one of this name, and plan to fill it."""
        record = find_tensor(self._name, key, self._stored, self.plan)
        where = f"{self._name}.{key}"
        dtype = self._target_dtype(key, record)
        if live is None:
            found = self._new.get(id(record))
            if found is None:
                found = new_tensor(
                    record, dtype, self._device, self._record.strides.get(self._record.aliases.get(key, key))
                )
                self._new[id(record)] = found
                self.plan.add(record, found, where, new=True)
            return found
        problem = self._misfit(record, dtype, live)
        if problem is not None:
            self._note(where, problem)
            return torch.empty(0)
        place: torch.Tensor = live
        if live.is_meta and is_distributed(live):
            place = distributed_like(live, live.dtype, torch.device(self._device or "cpu"))
        elif live.is_meta:
            strides = live.stride() if is_dense(tuple(live.shape), live.stride()) else None
            place = new_tensor(record, live.dtype, self._device, strides)
        self.plan.add(record, place, where, new=place is not live)
        return place

    def _target_dtype(self, key: str, record: StoredTensor) -> torch.dtype:
        saved = DTYPES[record.dtype]
        return self._dtype if self._dtype is not None and saved.is_floating_point and key not in self._exact else saved

    def _misfit(self, record: StoredTensor, dtype: torch.dtype, live: Any) -> str | None:
        saved = DTYPES[record.dtype]
        if not isinstance(live, torch.Tensor):
            return f"saved as a tensor, like has a {type(live).__name__}"
        if hides_values(live):
            return f"saved as a plain tensor, like has a {type(live).__name__}"
        if tuple(live.shape) != record.shape:
            return f"saved with shape {list(record.shape)}, like has {list(live.shape)}"
        if live.dtype not in (saved, dtype):
            return f"saved as {saved}, like has {live.dtype} (load(..., dtype={live.dtype}) converts)"
        return None


def _module_tree(name: str, record: ComponentRecord, tree: JsonValue) -> dict[str, JsonValue]:
    """Return a tree that has all of a module: its tensors, and what was no plain tensor in its ``state_dict``."""
    if not isinstance(tree, dict) or "$" in tree:
        raise CheckpointDamaged(f"component {name!r} was saved as a module and does not look like one")
    inside = set(jsontree.tensor_names(tree))
    plain = [key for key in (*record.tensors, *record.aliases) if key not in inside]
    return {**{key: {"$": "tensor", "v": key} for key in plain}, **tree}


def _names_inside(tree: JsonValue, wrapped: bool = False) -> Iterator[str]:
    """Yield the names of the tensors inside of tensors that wrap others."""
    stack: list[tuple[JsonValue, bool]] = [(tree, wrapped)]
    while stack:
        node, within = stack.pop()
        if isinstance(node, list):
            stack += [(item, within) for item in node]
        elif isinstance(node, dict):
            if within and node.get("$") == "tensor":
                yield str(node.get("v"))
            within = within or node.get("$") == "wrapper"
            stack += [(item, within) for item in node.values()]


def _key(tree: JsonValue) -> Any:
    """Return a key of a mapping; one that holds anything but plain values is none that a caller can have."""
    try:
        key = jsontree.decode(tree, _unused)
        hash(key)
    except (TypeError, InvalidOption):
        return object()
    return key


def _unused(name: str) -> torch.Tensor:
    raise InvalidOption(f"a key that has the tensor {name!r:.80}")
