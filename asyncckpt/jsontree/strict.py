"""Checkpoints hold JSON text: this module has the one way to write it, and a parser that trusts nothing."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, NoReturn

import numpy as np

from asyncckpt.errors import CheckpointDamaged
from asyncckpt.types import JsonValue

MAX_DEPTH: Final = 500
#: To parse a long int takes quadratic time. Python has the same limit, unless somebody has turned it off.
MAX_DIGITS: Final = 4300
_DIGITS_AS_ZERO: Final = bytes.maketrans(b"123456789", b"0" * 9)
_TOO_LONG: Final = b"0" * (MAX_DIGITS + 1)
_NOT_STRUCTURE: Final = bytes(set(range(256)) - set(b'"[]{}'))


def dumps(tree: JsonValue | Mapping[str, Any]) -> bytes:
    """Return one line of compact ASCII JSON, with its newline; keys keep their order. Raises ``ValueError`` for nan and
    infinities."""
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def loads(data: bytes, what: str) -> JsonValue:
    """Parse one strict JSON document. Raises ``CheckpointDamaged``, which names the file as ``what``, for anything
    else.

    It refuses invalid UTF-8, text after the document, duplicate keys, NaN, infinities (overflowing floats included),
    ints of more than 4300 digits, and nesting deeper than 500.
    """
    try:
        text = data.decode("utf-8")
        if _deeper_than(data, MAX_DEPTH):
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        # a Python call for every int doubles the time for a large manifest, so it is made only where one may be too
        # long
        suspicious = _TOO_LONG in data.translate(_DIGITS_AS_ZERO)
        parsed: JsonValue = (_WARY if suspicious else _STRICT).decode(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{what}: no valid JSON ({error}): damaged, or not written by asyncckpt") from error
    return parsed


def _deeper_than(data: bytes, limit: int) -> bool:
    """Return whether brackets outside strings are nested deeper than ``limit``: the parser, which recurses, must not
    see such text."""
    if data.count(b"[") + data.count(b"{") <= limit:
        return False
    if b"\\" in data:
        data = re.sub(rb"\\.", b"", data, flags=re.DOTALL)
    marks = np.frombuffer(data.translate(None, _NOT_STRUCTURE), dtype=np.uint8)
    in_string = np.bitwise_xor.accumulate((marks == ord('"')).view(np.uint8)).view(np.bool_)
    change = np.zeros(len(marks), dtype=np.int8)
    change[(marks == ord("[")) | (marks == ord("{"))] = 1
    change[(marks == ord("]")) | (marks == ord("}"))] = -1
    change[in_string] = 0
    return bool(change.cumsum(dtype=np.int64).max(initial=0) > limit)


def _object(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r:.80} appears twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large for a float")
    return number


def _short_int(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"an int of over {MAX_DIGITS} digits")
    return int(text)


_STRICT: Final = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_constant)
_WARY: Final = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_constant, parse_int=_short_int
)
