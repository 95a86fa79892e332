"""Quantities are told to people, alike in the command and in reports."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Format bytes for people, in decimal units like disks."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"
