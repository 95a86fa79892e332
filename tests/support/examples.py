"""What the fast suite samples: random examples, other ones in each run, and cells of tables. The slow one tries all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings

#: ``ASYNCCKPT_EXAMPLES=all``, as ``make test-slow`` has it.
_ALL = os.environ.get("ASYNCCKPT_EXAMPLES") == "all"


def some(count: int) -> int:
    """``count``, or in the fast suite a quarter of it, though ten at least."""
    return count if _ALL else max(count // 4, min(count, 10))


def examples(count: int, **more: Any) -> settings:
    """Hypothesis's settings for so many examples, whatever time each takes."""
    return settings(max_examples=some(count), deadline=None, **more)


def thinned(cells: Iterable[tuple[Any, ...]], every: int) -> list[Any]:
    """Parameters of which one of ``every`` is of the fast suite. Choose it so that every value still occurs there."""
    return [
        pytest.param(*cell, marks=() if number % every == 0 else pytest.mark.slow) for number, cell in enumerate(cells)
    ]
