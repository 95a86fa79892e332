"""A step is whatever says that it is a whole number, as loops have it in several forms."""

from __future__ import annotations

import operator

from asyncckpt.errors import InvalidStep


def step_number(step: object) -> int:
    """Return a step as an ``int``. It may be any whole number >= 0: NumPy's, or a tensor with one integer, whose device
    is then waited for. Raises ``InvalidStep`` for anything else, a bool among them."""
    if type(step) is int and step >= 0:
        return step
    try:
        number = operator.index(step)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        number = -1
    if number < 0 or isinstance(step, bool) or str(getattr(step, "dtype", "")) in ("torch.bool", "bool"):
        raise InvalidStep(f"step must be a whole number >= 0, not {step!r:.80}")
    return number
