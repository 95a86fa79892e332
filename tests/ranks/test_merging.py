"""Trees of many ranks are united into one, in time that grows with their sizes together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.errors import RanksDisagree
from asyncckpt.ranks.merging import merge_trees

_KEYS = st.sampled_from("abcd")
_TREES = st.recursive(st.integers(0, 2), lambda inner: st.dictionaries(_KEYS, inner, max_size=4), max_leaves=12)


def _flat(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[tuple[str, ...], Any] = {(*path, "{}"): None}
    for key, value in tree.items():
        found |= _flat(value, (*path, key))
    return found


@given(trees=st.lists(st.dictionaries(_KEYS, _TREES, max_size=4), min_size=1, max_size=5))
def test_the_union_has_what_each_has_or_names_a_conflict(trees: list[dict[str, Any]]) -> None:
    before = copy.deepcopy(trees)
    expected: dict[tuple[str, ...], Any] = {}
    conflict = False
    for flat in map(_flat, trees):
        kinds = {path[: n + 1] for path in expected for n in range(len(path))}
        for path, value in flat.items():
            conflict = conflict or expected.get(path, value) != value
            if path[-1] == "{}":  # a dict here is a value there
                conflict = conflict or path[:-1] in expected
            else:
                conflict = conflict or (*path, "{}") in kinds
        expected |= flat
    try:
        united = merge_trees("c", "other", list(enumerate(trees)), {})
    except RanksDisagree:
        assert conflict
    else:
        assert not conflict
        assert _flat(united) == expected
    assert trees == before, "what the ranks reported stays as it is"


def test_three_ranks_add_to_the_dicts_of_each_other() -> None:
    trees = [{"state": {f"w{rank}": {"step": rank}}, "shared": {"n": 1}} for rank in range(3)]
    found = merge_trees("optimizer", "other", list(enumerate(trees)), {})
    assert found == {"state": {f"w{rank}": {"step": rank} for rank in range(3)}, "shared": {"n": 1}}
    with pytest.raises(RanksDisagree, match=r"optimizer\.shared\.n differs between ranks 0 and 2"):
        merge_trees("optimizer", "other", [(0, trees[0]), (2, {"shared": {"n": 2}})], {})
