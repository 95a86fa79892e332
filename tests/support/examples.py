"""How many examples the fast suite tries: a quarter of those that ``make test-slow`` does, other ones in each run."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

#: ``ASYNCCKPT_EXAMPLES=all``, as ``make test-slow`` has it.
_ALL = os.environ.get("ASYNCCKPT_EXAMPLES") == "all"


def some(count: int) -> int:
    """``count``, or in the fast suite a quarter of it, though ten at least."""
    return count if _ALL else max(count // 4, min(count, 10))


def examples(count: int, **more: Any) -> settings:
    """Hypothesis's settings for so many examples, whatever time each takes."""
    return settings(max_examples=some(count), deadline=None, **more)
