"""Planted bugs are listed here, and planted by patching one or two methods."""

from __future__ import annotations

import contextlib
import functools
import os
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from asyncckpt.storage.local import LocalStore
from faults.mutant_checks import Check

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mutant:
    """``apply`` plants the bug; each of ``caught_by`` has to notice."""

    name: str
    apply: Callable[[Patch], None]
    caught_by: tuple[Check, ...]


MUTANTS: list[Mutant] = []


def mutant(name: str, *caught_by: Check) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def add(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTANTS.append(Mutant(name, apply, caught_by))
        return apply

    return add


@contextlib.contextmanager
def deaf(store: LocalStore, call: str) -> Iterator[None]:
    """Within, ``call`` does nothing."""
    real = store.ops
    silent = types.SimpleNamespace(**{name: getattr(real, name) for name in dir(real) if not name.startswith("__")})
    setattr(silent, call, lambda *_: None)
    store.ops = silent  # type: ignore[assignment]
    try:
        yield
    finally:
        store.ops = real


def around(patch: Patch, owner: Any, name: str, mutated: Callable[..., Any]) -> None:
    """``mutated(original, self, …)`` instead of the method."""
    original = getattr(owner, name)
    patch.setattr(owner, name, functools.wraps(original)(lambda *args, **more: mutated(original, *args, **more)))


def remove_though_read(store: LocalStore, name: str) -> None:
    """As the store does it, whoever is reading."""
    trash = os.path.join(store.path, f".trash-{name}")
    store.ops.rename_noreplace(os.path.join(store.path, name), trash)
    store.ops.fsync_directory(store.path)
    store.delete_tree(trash)
