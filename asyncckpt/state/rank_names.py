"""A component that each rank has of its own is stored under a name of its own for each rank."""

from __future__ import annotations


def rank_name(component: str, rank: int) -> str:
    """Return the name that a rank's own component is stored under. Rank 0's keeps the component's name, so that a
    process alone finds it."""
    return f"{component}+{rank}" if rank else component


def without_rank(component: str) -> str:
    """Return the name that a component has on every rank; ``rank_name`` makes the opposite."""
    name, _, rank = component.rpartition("+")
    return name if name and rank.isdecimal() else component
