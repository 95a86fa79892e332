"""Tensors of subclasses that wrap others take their stored values in place: the tensors inside them are filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from asyncckpt import jsontree
from asyncckpt.errors import UnsupportedValue
from asyncckpt.jsontree import Wrapper, is_wrapper
from asyncckpt.jsontree.wrapper_tensors import of_live
from asyncckpt.manifest.records import ComponentRecord, StoredTensor
from asyncckpt.restore.plan import RestorePlan, StoredTensors, find_tensor, not_saved
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.state.wrappers import PLAIN_TYPES
from asyncckpt.types import JsonValue

#: What a user can do where the classes of tensors differ.
_WAY_OUT = (
    "make the live one as it was when it was saved (quantise it in the same way, give the optimizer the same options), "
    "or read what was saved with Run.load"
)


class DoesNotFit(Exception):
    """A stored tensor of a wrapping subclass cannot go to its place. The message says why."""


def fill_wrapper(
    node: Wrapper,
    live: Any,
    record_of: Callable[[str, str], StoredTensor],
    plan: RestorePlan,
    where: str,
    *,
    new: bool = False,
) -> None:
    """Have a live wrapper take a stored one, in place, or raise ``DoesNotFit`` before ``plan`` has anything of it.

    ``record_of`` returns what was stored of one of the tensors inside, given the attributes that lead to it, joined by
    dots, and its name in the tree. ``where`` is the place's name, for messages. ``new``: it is not part of the live
    state yet."""
    mine, leaves = _described(live)
    problem = node.difference(mine)
    if problem is not None:
        raise DoesNotFit(f"{problem}; {_WAY_OUT}")
    records = {path: record_of(path, name) for path, name in node.leaves()}
    for path, record in records.items():
        part = leaves[path]
        saved = DTYPES[record.dtype]
        if part.is_meta:
            raise DoesNotFit(f"{path} inside is on the meta device; make the live one on another device first")
        if record.shape != tuple(part.shape) or saved != part.dtype:
            raise DoesNotFit(
                f"{path} inside was saved as {saved} {list(record.shape)}, live {part.dtype} {list(part.shape)}; "
                f"{_WAY_OUT}"
            )
    for path, record in records.items():
        plan.add(record, leaves[path], f"{where}.{path}", new=new)


def _described(live: Any) -> tuple[Wrapper, Mapping[str, torch.Tensor]]:
    try:
        return of_live(live, jsontree.encode)
    except UnsupportedValue as error:
        raise DoesNotFit(str(error)) from error


def fill_or_make(
    component: str, stored: StoredTensors, plan: RestorePlan, make: Callable[[Wrapper], Any]
) -> Callable[[Wrapper, Any, str], Any]:
    """Return the function that ``jsontree.decode`` asks for tensors of wrapping subclasses in a component's tree. It
    fills live ones in place, and one that ``make`` returns where nothing lives. It raises ``DoesNotFit``."""

    def take(node: Wrapper, live: Any, where: str) -> Any:
        new = live is None or isinstance(live, dict)

        def record_of(_path: str, name: str) -> StoredTensor:
            return find_tensor(component, name, stored, plan)

        try:
            if new:
                live = make(node)
            elif not is_wrapper(live):
                raise DoesNotFit(not_live(node, live))
            if is_wrapper(live):
                fill_wrapper(node, live, record_of, plan, component, new=new)
        except DoesNotFit as error:
            raise DoesNotFit(f"{where}: {error}") from error
        return live

    return take


def fill_or_note(
    component: str, stored: StoredTensors, plan: RestorePlan, *, plain: bool = False
) -> Callable[[Wrapper, Any, str], Any]:
    """Do what ``fill_or_make`` does, and note in ``plan`` what does not fit: the live value stays. ``plain``: a tensor
    of which nothing lives becomes plain data; otherwise it is a mismatch, too."""

    def make(node: Wrapper) -> Any:
        if plain:
            return NotImplemented
        raise DoesNotFit(not_live(node, None))

    take = fill_or_make(component, stored, plan, make)

    def noted(node: Wrapper, live: Any, where: str) -> Any:
        try:
            return take(node, live, where)
        except DoesNotFit as error:
            plan.mismatched.append(f"{component}{error}")
            return live

    return noted


def not_live(node: Wrapper, live: Any) -> str:
    """Say that a wrapper was saved where none lives."""
    saved = node.class_name.rpartition(".")[2]
    here = "nothing is live at its place" if live is None else f"live is a {type(live).__name__}"
    if type(live) in PLAIN_TYPES:
        here = "live is a plain tensor"
    return f"saved as a {saved:.200}, which wraps other tensors, and {here}; {_WAY_OUT}"


def make_wrapper(
    node: Wrapper,
    class_of: Callable[[str], type | None],
    record_of: Callable[[str], StoredTensor],
    new: Callable[[StoredTensor], torch.Tensor],
) -> Any:
    """Make a tensor that can take what was stored of a wrapper. ``class_of`` returns the class of a stored name,
    ``record_of`` what was stored under a name in the tree, and ``new`` memory for it. Raises ``DoesNotFit``."""
    kind = class_of(node.class_name)
    if kind is None:
        raise DoesNotFit(
            f"saved as a {node.class_name:.200}, a class that the live optimizer does not know; let it make its state, "
            f"by a step, before restoring"
        )
    if jsontree.needs_live(node.context):
        raise DoesNotFit(
            f"saved as a {kind.__name__} whose context has values that only a live one can give their types; let the "
            f"optimizer make its state, by a step, before restoring"
        )
    inside = {
        name: make_wrapper(part, class_of, record_of, new) if isinstance(part, Wrapper) else new(record_of(part))
        for name, part in node.inside.items()
    }
    context = jsontree.decode(node.context, _no_tensor)
    size = torch.Size(node.size)
    try:
        stride = torch.empty(size, device="meta").stride()
        made = kind.__tensor_unflatten__(inside, context, size, stride)  # type: ignore[attr-defined]
        if type(made) is not kind:
            raise TypeError(f"it makes a {type(made).__name__}")
    except Exception as error:  # whatever the class raises; a forged context may be anything
        raise DoesNotFit(f"{kind.__name__} does not take what was saved ({type(error).__name__}: {error})") from error
    return made


def _no_tensor(name: str) -> torch.Tensor:
    raise DoesNotFit(f"a context that has a tensor, {name!r:.80}")


@dataclass(frozen=True, slots=True)
class HeldWrapper:
    """``HeldWrapper`` is a stored wrapping tensor of a module, with the stored tensors inside it by the attributes that
    lead to them."""

    node: Wrapper
    inside: dict[str, StoredTensor] = field(default_factory=dict)


class StoredWrappers:
    """Finds what was stored of the wrapping tensors of modules by the records of the tensors inside, because ``rename``
    may have given those other names. ``components`` and ``trees``: the checkpoint's."""

    def __init__(self, components: Mapping[str, ComponentRecord], trees: Mapping[str, JsonValue]) -> None:
        self._places: dict[int, tuple[Wrapper, str]] = {}
        for name, component in components.items():
            tree = trees.get(name) if component.kind == "module" else None
            if isinstance(tree, dict):
                for entry in filter(_is_node, tree.values()):
                    node: Wrapper = jsontree.decode(entry, _no_tensor, wrappers=lambda node, _live, _where: node)
                    for path, key in node.leaves():
                        record = component.tensors.get(component.aliases.get(key, key))
                        if record is not None:
                            self._places[id(record)] = node, path

    def of_module(self, name: str, stored: StoredTensors) -> dict[str, HeldWrapper]:
        """Return the wrapping tensors of a component by the qualified names that they have now."""
        found: dict[str, HeldWrapper] = {}
        for key, record in stored.items() if self._places else ():
            node, path = self._places.get(id(record), (None, ""))
            if node is not None and key.startswith(f"{name}.") and key.endswith(f".{path}"):
                found.setdefault(key[: -len(path) - 1], HeldWrapper(node)).inside[path] = record
        return found


def _is_node(entry: JsonValue) -> bool:
    return isinstance(entry, dict) and entry.get("$") == "wrapper"


def without_wrappers(tree: JsonValue) -> JsonValue:
    """Return a module's plain values without what they say of wrapping tensors."""
    if not isinstance(tree, dict) or "$" in tree:
        return tree
    return {name: entry for name, entry in tree.items() if not _is_node(entry)}


def plan_in_module(
    qualified: str, live: Any, held: HeldWrapper | None, plain: StoredTensor | None, plan: RestorePlan
) -> None:
    """Plan the restore of a wrapping tensor of a module. ``qualified``: its live name. ``held`` or ``plain``: what was
    stored under that name."""

    def record_of(path: str, _key: str) -> StoredTensor:
        record = held.inside.get(path) if held is not None else None
        if record is None:
            raise DoesNotFit(f"{path} inside is missing from the checkpoint")
        return record

    try:
        if held is not None:
            fill_wrapper(held.node, live, record_of, plan, qualified)
        elif plain is not None:
            raise DoesNotFit(not_saved(plain, live))
        else:
            plan.missing.append(qualified)
    except DoesNotFit as error:
        plan.mismatched.append(f"{qualified}: {error}")
