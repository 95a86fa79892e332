"""Planted bugs: what a harness must catch before anybody believes it. Each is one or two methods, patched.

Each module adds its own to ``MUTANTS`` when it is imported, which is here.
"""

from faults.mutants import beside_saves, catalog, content, copies, durability, errors, order, state
from faults.mutants.registry import MUTANTS, Mutant

__all__ = [
    "MUTANTS",
    "Mutant",
    "beside_saves",
    "catalog",
    "content",
    "copies",
    "durability",
    "errors",
    "order",
    "state",
]
