"""The plain values of a component that several ranks hold parts of are united into one tree.

Dicts are united key by key. An optimizer's parameter groups are united by what is in them, never by their position:
each rank has its own (pipeline stages with learning rates of their own, say). What two ranks have differently is a
conflict, and none of them is right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from asyncckpt import jsontree
from asyncckpt.errors import RanksDisagree
from asyncckpt.state.optimizer import BY_PARAMETER
from asyncckpt.types import JsonValue

_Path: TypeAlias = tuple[str, ...]
#: Dicts whose keys are no plain text are stored as a list of keys and values, under one of these tags.
_PAIRED = frozenset({"dict", "OrderedDict", "defaultdict"})


def merge_trees(
    component: str,
    kind: str,
    trees: Sequence[tuple[int, JsonValue]],
    digests: Mapping[str, str],
    *,
    first_is_right: bool = False,
) -> JsonValue:
    """Unite the trees of one component, each with the rank it came from.

    ``digests``: those of the tensors in parameter groups, by name: groups that hold equal ones are alike.
    ``first_is_right``: of values that differ, the first tree's stay. Raises ``RanksDisagree`` for them otherwise, which
    names the value and the ranks."""
    rank, united = trees[0]
    others = trees[1:]
    groups: JsonValue = None
    if kind == "optimizer":
        groups = _unite_groups(component, trees, digests, first_is_right)
        united, *rest = (_without_groups(tree) for _, tree in trees)
        others = [(other, tree) for (other, _), tree in zip(others, rest, strict=True)]
    made: dict[int, JsonValue] = {}
    for other, tree in others:

        def conflict(path: _Path, other: int = other) -> None:
            if not first_is_right:
                raise _disagree(".".join((component, *path)), (rank, other))

        united = _unite(united, tree, (), conflict, made)
    if groups is None or not isinstance(united, dict):
        return united
    return {**united, "param_groups": groups}


def _disagree(what: str, ranks: Sequence[int]) -> RanksDisagree:
    return RanksDisagree(
        f"{what} differs between ranks {' and '.join(map(str, ranks))}, and belongs to a component that they hold "
        f"together. Nothing was published; make it equal, keep what is a rank's own in a component of its own, or say "
        f"whose is right: asyncckpt.Owner(…, rank={ranks[0]})"
    )


def _unite(
    first: JsonValue, second: JsonValue, path: _Path, conflict: Callable[[_Path], None], made: dict[int, JsonValue]
) -> JsonValue:
    """Unite two values; ``conflict`` is called for those that differ, and the first of them stays where it returns.
    ``made``: the dicts that were made here, by identity. They are added to, so that many trees are united in the time
    that their sizes take together; other values are left as they are."""
    if first == second and type(first) is type(second):
        return first
    if isinstance(first, dict) and isinstance(second, dict):
        tag = first.get("$")
        if tag is None and "$" not in second:
            united: dict[str, JsonValue] = first if id(first) in made else dict(first)
            made[id(united)] = united
            for name, value in second.items():
                both = name in united
                united[name] = _unite(united[name], value, (*path, name), conflict, made) if both else value
            return united
        alike = {key: value for key, value in first.items() if key != "v"} == {
            key: value for key, value in second.items() if key != "v"
        }
        if tag in _PAIRED and alike:
            mine, others = dict(_pairs(first["v"])), dict(_pairs(second["v"]))
            flat: list[JsonValue] = []
            for text, (key, value) in {**others, **mine}.items():
                both = text in mine and text in others
                flat += [key, _unite(value, others[text][1], (*path, text), conflict, made) if both else value]
            return {**first, "v": flat}
    conflict(path)
    return first


def _pairs(flat: JsonValue) -> Iterator[tuple[str, tuple[JsonValue, JsonValue]]]:
    """Yield the keys and values of a dict that is stored as a list, by the keys' text."""
    assert isinstance(flat, list)
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        yield jsontree.dumps(key).decode().strip(), (key, value)


# -- parameter groups ------------------------------------------------------------------------------------------------


def _groups(tree: JsonValue) -> list[dict[str, Any]]:
    groups = tree.get("param_groups") if isinstance(tree, dict) else None
    return [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []


def _without_groups(tree: JsonValue) -> JsonValue:
    return {key: value for key, value in tree.items() if key != "param_groups"} if isinstance(tree, dict) else tree


def _unite_groups(
    component: str, trees: Sequence[tuple[int, JsonValue]], digests: Mapping[str, str], first_is_right: bool
) -> JsonValue:
    """Unite the groups of all ranks: those whose hyper-parameters are equal become one. Where a rank has several such
    groups they stay apart. A parameter that two ranks have must have the same hyper-parameters on both."""
    united: dict[tuple[str, int], dict[str, Any]] = {}
    places: dict[str, tuple[str, int]] = {}  # of each parameter: what its group has in it, and on which rank
    for rank, tree in trees:
        counts: dict[str, int] = {}
        for group in _groups(tree):
            content = _content(group, digests)
            number = counts[content] = counts.get(content, -1) + 1
            fresh = _fresh(component, group, content, rank, places, first_is_right)
            known = united.setdefault((content, number), {**group, **{k: [] for k in BY_PARAMETER if k in group}})
            for index in fresh:
                places[group["params"][index]] = content, rank
                for key in BY_PARAMETER:
                    if key in group and key in known:
                        known[key].append(group[key][index])
    # a group that another rank's parameters are in already would come back as one that nobody has
    return [group for group in united.values() if group["params"] or len(united) == 1] or list(united.values())


def _fresh(
    component: str,
    group: Mapping[str, Any],
    content: str,
    rank: int,
    places: Mapping[str, tuple[str, int]],
    first_is_right: bool,
) -> list[int]:
    """Return the indexes of a group's parameters that no rank before had. Raises ``RanksDisagree`` where one had a
    parameter with other hyper-parameters."""
    found: list[int] = []
    for index, name in enumerate(group["params"]):
        known = places.get(name)
        if known is None:
            found.append(index)
        elif known[0] != content and not first_is_right:
            mine, other = json.loads(content), json.loads(known[0])
            keys = [key for key in {**other, **mine} if mine.get(key) != other.get(key)]
            raise _disagree(f"{component}.param_groups: {', '.join(keys)} of parameter {name!r}", (known[1], rank))
    return found


def _content(group: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """Return what two groups must have in common to be one, as JSON text."""
    shared = {key: _with_digests(value, digests) for key, value in group.items() if key not in BY_PARAMETER}
    return jsontree.dumps(dict(sorted(shared.items()))).decode()


def _with_digests(tree: JsonValue, digests: Mapping[str, str]) -> JsonValue:
    """Replace references to tensors by the tensors' digests, where these are known."""
    if isinstance(tree, list):
        return [_with_digests(item, digests) for item in tree]
    if not isinstance(tree, dict):
        return tree
    name = tree.get("v")
    if tree.get("$") == "tensor" and isinstance(name, str):
        return {"$": "tensor", "v": digests.get(name, name)}
    return {key: _with_digests(value, digests) for key, value in tree.items()}
