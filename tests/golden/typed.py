"""Values of the kinds that version 4 of the format has tags for, and the types of some of them."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import io
import pathlib
from typing import Any, NamedTuple

import numpy as np
import torch


class Phase(enum.Enum):
    """An enum, one of whose values is no text."""

    WARM = "warm"
    MAIN = (1, 2)


class Level(enum.IntFlag):
    """Flags, which may be combined."""

    LOW = 1
    HIGH = 2


class Score(NamedTuple):
    """A named tuple that holds a tensor."""

    loss: float
    at: torch.Tensor | None


class Text(str):
    """Text of a class of its own, like that of ``torch.__version__``."""

    __slots__ = ()


@dataclasses.dataclass
class Progress:
    """A dataclass that holds values of the other kinds."""

    epoch: int
    phase: Phase
    best: Score


def progress(seed: int, at: torch.Tensor | None) -> Progress:
    """Another phase for seeds of 50 and more, which live states are built with."""
    return Progress(seed, Phase.MAIN if seed < 50 else Phase.WARM, Score(seed / 7, at))


def values(seed: int, first: torch.Tensor, second: torch.Tensor) -> dict[str, Any]:
    """Values of the standard library and of NumPy, and of types that only this module can name."""
    zone = datetime.timezone(datetime.timedelta(hours=5, minutes=30), "IST")
    stream = io.BytesIO(bytes(range(seed, seed + 9)))
    stream.seek(4)
    standard = {
        "paths": [pathlib.Path(f"out/{seed}"), pathlib.PurePosixPath("/a"), pathlib.PureWindowsPath("C:\\a")],
        "times": [
            datetime.date(2026, 1, seed % 28 + 1),
            datetime.datetime(2026, 10, 25, 2, 30, 0, seed, zone, fold=1),
            datetime.time(1, 2, 3, seed),
            datetime.timedelta(-seed, 5, 7),
            datetime.UTC,
        ],
        "stream": stream,
        "ranges": [range(seed, 2**70, 3), slice(None, seed, (1, "a"))],
        "numpy": [np.str_("ä"), np.bytes_(b"a\0"), np.datetime64(seed, "25us"), np.timedelta64(-seed, "D")],
        "arrays": [np.array(["", "ä€"]), np.array([b"a", b"bc"]), np.array([seed], dtype=">m8[ns]")],
    }
    whole = progress(seed, first)
    program = {
        "progress": whole,
        "by_phase": {Phase.MAIN: Level(seed % 4), 5: Text(f"n{seed}")},
        "members": {whole.phase, "a"},
        "history": [whole.best._replace(at=second), (whole.phase,)],
    }
    return {"standard": standard, "program": program}
