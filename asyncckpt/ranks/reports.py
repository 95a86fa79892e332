"""Rank 0 makes one checkpoint's contents of what all ranks have reported."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from asyncckpt.errors import RanksDisagree
from asyncckpt.events import RanksReported, SlowestRank
from asyncckpt.manifest.draft import Contents
from asyncckpt.ranks.merging import merge_trees
from asyncckpt.types import JsonValue


def merge_reports(
    contents: Contents,
    reports: Sequence[Mapping[str, Any]],
    rank_local_names: Mapping[str, str],
    owners: Mapping[str, int],
) -> Contents:
    """Merge all reports into the checkpoint's contents: a shared component's values come from the ranks that lead it,
    and a rank's own component is kept where it differs from rank 0's. ``rank_local_names`` are rank 0's; ``owners``:
    see ``RankSave``. Raises ``RanksDisagree``."""
    own_of_lead = set(rank_local_names.values())
    trees: dict[str, JsonValue] = {}
    shared: dict[str, list[tuple[int, JsonValue]]] = {}
    aliases: dict[str, dict[str, str]] = {name: {} for name in contents.kinds}
    descriptions: dict[str, dict[str, Any]] = {name: {} for name in contents.kinds}
    others: dict[str, JsonValue] = {}
    groups = {name: digest for report in reports for name, digest in report["groups"].items()}
    for rank, report in enumerate(reports):
        for name, tree in report["trees"].items():
            if name not in report["own"]:
                shared.setdefault(name, []).append((rank, tree))
            elif rank == 0:
                trees[name] = tree
            else:
                entry = report["own"][name]
                base = name.removesuffix(f"+{rank}")
                if entry["tensors"] or base not in own_of_lead or tree != trees.get(base):
                    trees[name], others[name] = tree, entry
        for name, found in report["aliases"].items():
            _add_aliases(name, aliases[name], found, rank)
        for name, found in report["descriptions"].items():
            strides = {**found.get("strides", {}), **descriptions[name].get("strides", {})}
            descriptions[name] = {**found, **descriptions[name]} | ({"strides": strides} if strides else {})
    for name, found in shared.items():
        kind, owner = contents.kinds[name], owners.get(name)
        found.sort(key=lambda item: item[0] != owner)  # the owner's come first
        digests = {key.removeprefix(f"{name}."): digest for key, digest in groups.items() if key.startswith(f"{name}.")}
        trees[name] = merge_trees(name, kind, found, digests, first_is_right=owner is not None or kind == "module")
    described = {**contents.descriptions, **{name: found for name, found in descriptions.items() if found}}
    return replace(contents, trees=trees, aliases=aliases, descriptions=described, others=others)


def slowest_ranks(step: int, reports: Sequence[Mapping[str, Any]], arrivals: Mapping[int, float]) -> RanksReported:
    """Say which ranks were the last to have done each phase of a save. ``arrivals``: how long rank 0 has waited for
    each of the others, in seconds."""
    found = []
    for number, phase in enumerate(("stage", "write")):
        seconds = [float(report["phases"][number]) for report in reports]
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        found.append(SlowestRank(phase, slowest, seconds[slowest], statistics.median(seconds)))
    last = max(arrivals, key=arrivals.__getitem__, default=0)
    return RanksReported(
        step=step,
        ranks=len(reports),
        waited_seconds=arrivals.get(last, 0.0),
        last_rank=last,
        slowest=tuple(found),
    )


def _add_aliases(component: str, known: dict[str, str], found: Mapping[str, str], rank: int) -> None:
    """Add a rank's other names of tied tensors to those of the ranks before it."""
    for alias, target in found.items():
        if known.setdefault(alias, target) != target:
            raise RanksDisagree(
                f"tensor {component}.{alias} is tied to {target!r} on rank {rank}, and to {known[alias]!r} on a rank "
                f"before it. Tie it alike on all ranks that have it"
            )
