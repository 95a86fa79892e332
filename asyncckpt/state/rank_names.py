"""What a rank's own component is stored as."""

from __future__ import annotations


def rank_name(component: str, rank: int) -> str:
    """What a rank's own component is stored as: rank 0's under its name, so that one process finds it."""
    return f"{component}+{rank}" if rank else component
