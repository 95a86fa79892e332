"""What the verbs share: exit codes, one way to fail, one way to name a step, units for people."""

from __future__ import annotations

import contextlib
import enum
import json
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from asyncckpt.catalog import CheckpointInfo
from asyncckpt.errors import (
    AsyncCkptError,
    CheckpointDamaged,
    CheckpointNotFound,
    InvalidOption,
    RunLocked,
    UnknownName,
)
from asyncckpt.run import Run

console = Console()
errors = Console(stderr=True)


class Exit(enum.IntEnum):
    """Exit codes of every verb."""

    GOOD = 0
    DAMAGED_OR_DIFFERENT = 1
    USAGE = 2
    NOT_FOUND = 3
    BUSY = 4
    FAILED = 5


EXIT_CODES = (
    "Exit codes: 0 good; 1 damage found, or a difference (diff); 2 wrong usage; 3 no such run or step; 4 another live "
    "run holds the directory; 5 any other error."
)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="the run directory", show_default=False)]
StepArgument = Annotated[str, typer.Argument(metavar="[STEP]", help="a step, or 'latest'")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON, and nothing else, on stdout")]


def open_run(path: str) -> Run:
    """A run for reading. Raises ``CheckpointNotFound`` where there is no such directory."""
    import os

    if not os.path.isdir(path):
        raise CheckpointNotFound(f"{path}: no such run directory")
    return Run(path)


def find(run: Run, step: str) -> CheckpointInfo:
    """The checkpoint a user named. Raises ``CheckpointNotFound`` and ``InvalidOption``."""
    entries = run.ls()
    if step == "latest":
        usable = [entry for entry in entries if entry.damage is None and entry.kind == "full"]
        usable = usable or [entry for entry in entries if entry.damage is None]
        if not usable:
            raise CheckpointNotFound(f"{run.path}: no usable checkpoint here")
        return usable[-1]
    if not step.isdecimal():
        raise InvalidOption(f"{step!r} is no step: give a whole number or 'latest'")
    matches = [entry for entry in entries if entry.step == int(step)]
    if not matches:
        have = ", ".join(str(entry.step) for entry in entries[-10:]) or "none"
        raise CheckpointNotFound(f"{run.path}: no checkpoint of step {step}; the newest steps there: {have}")
    return min(matches, key=lambda entry: (entry.damage is not None, entry.kind != "full"))


@contextlib.contextmanager
def exits() -> Iterator[None]:
    """Turn this library's errors, and the system's, into one line on stderr and an exit code."""
    try:
        yield
    except CheckpointDamaged as error:
        fail(error, Exit.DAMAGED_OR_DIFFERENT)
    except CheckpointNotFound as error:
        fail(error, Exit.NOT_FOUND)
    except RunLocked as error:
        fail(error, Exit.BUSY)
    except (InvalidOption, UnknownName) as error:
        fail(error, Exit.USAGE)
    except (AsyncCkptError, OSError) as error:
        fail(error, Exit.FAILED)


def fail(error: object, code: Exit) -> NoReturn:
    """Leave with ``code`` and one line."""
    errors.print(f"[red]error[/red]: {str(error).replace('[', chr(92) + '[')}", soft_wrap=True, highlight=False)
    raise typer.Exit(int(code))


def print_json(value: Any) -> None:
    """JSON for programs: nothing else goes to stdout then."""
    json.dump(value, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


def size(nbytes: int) -> str:
    """Bytes for people, in decimal units like disks."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def age(unix_seconds: float) -> str:
    """How long ago, for people."""
    seconds = max(0.0, time.time() - unix_seconds)
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit} ago"
    return f"{seconds / 86_400:.0f} days ago"


def as_json(entry: CheckpointInfo) -> dict[str, Any]:
    """One ``ls`` row for programs."""
    return {
        "step": entry.step,
        "name": entry.name,
        "path": entry.path,
        "kind": entry.kind,
        "metrics": {name: value if value == value else None for name, value in entry.metrics.items()},
        "nbytes": entry.nbytes,
        "created_unix_seconds": entry.created_unix_seconds,
        "pinned": entry.pinned,
        "damage": entry.damage,
    }
