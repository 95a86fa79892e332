"""Saved parameter groups are found again by the names of their parameters, whatever their number and their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asyncckpt import jsontree
from asyncckpt.state.optimizer import BY_PARAMETER
from asyncckpt.types import JsonValue


def sources_of(
    component: str, live_groups: Sequence[Sequence[str]], trees: Sequence[JsonValue]
) -> tuple[list[int | None], list[str]]:
    """Find for each live group the saved one whose hyper-parameters it gets.

    ``live_groups``: the names of the parameters of each. ``trees``: the saved groups, encoded. Returns an index into
    ``trees`` for each live group, None where no saved group has one of its parameters, and what does not fit: a live
    group of parameters that were saved with different hyper-parameters gets none."""
    saved_groups = [tree if isinstance(tree, dict) else {} for tree in trees]
    place = {name: index for index, group in enumerate(saved_groups) for name in _names(group)}
    found: list[int | None] = []
    mismatched: list[str] = []
    for names in live_groups:
        sources = sorted({place[name] for name in names if name in place})
        differing = _differing([saved_groups[index] for index in sources])
        if differing:
            examples = [next(name for name in names if place.get(name) == index) for index in sources[:3]]
            mismatched.append(
                f"{component}: {', '.join(differing)} of {', '.join(examples)} differ in the checkpoint, and the live "
                f"optimizer has these parameters in one group; give it a group for each"
            )
        found.append(sources[0] if sources and not differing else None)
    return found, mismatched


def _names(group: Mapping[str, JsonValue]) -> list[Any]:
    names = group.get("params")
    return names if isinstance(names, list) else []


def _differing(groups: Sequence[Mapping[str, JsonValue]]) -> list[str]:
    """Return the hyper-parameters that are not alike in all of the groups."""
    keys = {key: None for group in groups for key in group if key not in BY_PARAMETER}
    return [key for key in keys if len({jsontree.dumps([group.get(key, "")]) for group in groups}) > 1]


def hyper_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what holds for all parameters of a group."""
    return {key: value for key, value in group.items() if key not in BY_PARAMETER}
