"""An error crosses from one process to the other as plain values, and is of the same class there."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any

from asyncckpt import errors

_PLAIN = (str, int, float, bool, type(None))
#: An error that another one came of is sent, too, but no chain of any length.
_MOST_CAUSES = 4


def as_data(error: BaseException, causes: int = _MOST_CAUSES) -> dict[str, Any]:
    """Return an error as plain values."""
    cause = error.__cause__
    return {
        "class": type(error).__name__,
        "text": str(error),
        "args": [value if isinstance(value, _PLAIN) else str(value) for value in error.args],
        "system": [getattr(error, name, None) for name in ("errno", "strerror", "filename")],
        "notes": list(getattr(error, "__notes__", ())),
        "cause": as_data(cause, causes - 1) if cause is not None and causes else None,
    }


def from_data(data: Mapping[str, Any]) -> BaseException:
    """Return the error that ``as_data`` was given: of the same class, where that is one of this library's or one of
    Python's, or else a ``SaveFailed`` that names its class."""
    kind = getattr(errors, data["class"], None) or getattr(builtins, data["class"], None)
    error: BaseException
    if isinstance(kind, type) and issubclass(kind, Exception):
        error = kind.__new__(kind)
        error.args = tuple(data["args"])
    else:
        error = errors.SaveFailed(f"{data['class']}: {data['text']}")
    if isinstance(error, OSError):
        for name, value in zip(("errno", "strerror", "filename"), data["system"], strict=True):
            if value is not None:
                setattr(error, name, value)
    for note in data["notes"]:
        error.add_note(note)
    if data["cause"] is not None:
        error.__cause__ = from_data(data["cause"])
    return error
