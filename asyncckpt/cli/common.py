"""The verbs share exit codes, one way to fail, one way to name and read a checkpoint, and units for people."""

from __future__ import annotations

import contextlib
import enum
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.text import Text

from asyncckpt.catalog.listing import CheckpointInfo, Preference, newest_of, of_name, of_step
from asyncckpt.catalog.newest import newest, refusal
from asyncckpt.errors import (
    AsyncCkptError,
    CheckpointDamaged,
    CheckpointNotFound,
    InvalidOption,
    NewestDamaged,
    RunLocked,
    RunPathError,
    UnknownName,
)
from asyncckpt.read.damage import Damage
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.report.quantities import size
from asyncckpt.run import Run
from asyncckpt.storage import scheme_of

# Names of checkpoints, metrics and tensors are other people's text, so they are never taken for markup. Without a
# terminal a row is one line, so that grep finds whole names.
_PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}
console = Console(width=None if sys.stdout.isatty() else 10_000, **_PLAIN)
errors = Console(stderr=True, **_PLAIN)

T = TypeVar("T")

#: A live run may delete a checkpoint while it is read; then it is looked for again, this many times in all.
_ATTEMPTS = 5

#: This word names the newest checkpoint, and every verb means the same by it.
LATEST = "latest"
LATEST_HELP = (
    "'latest' is the full checkpoint that the run saved last, damaged or not (its last weights-only one where it has "
    "no full one). Copies and renamed directories are never 'latest'. Where it is damaged, verify reports that, and "
    "the other verbs refuse and name the newest usable step."
)


class Exit(enum.IntEnum):
    """Every verb ends with one of these exit codes."""

    GOOD = 0
    DAMAGED_OR_DIFFERENT = 1
    USAGE = 2
    NOT_FOUND = 3
    BUSY = 4
    FAILED = 5


EXIT_CODES = (
    "Exit codes: 0 good; 1 damage found, a component missing (verify), a difference (diff), or an unsafe path (doctor);"
    " 2 wrong usage; 3 no such run or step; 4 another live run holds the directory; 5 any other error."
)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="the run directory", show_default=False)]
#: Every verb describes an argument that names a checkpoint in these words.
STEP_HELP = "a step, a name, or 'latest': the newest full checkpoint, damaged or not"
StepArgument = Annotated[str, typer.Argument(metavar="STEP", help=STEP_HELP)]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON, and nothing else, on stdout")]


def open_run(path: str) -> Run:
    """Open a run for reading. Raises ``CheckpointNotFound`` where there is no such directory, and ``InvalidOption`` for
    an address of no storage that there is, and for the path of a checkpoint itself."""
    run = Run(path)
    if scheme_of(path) == "file" and not os.path.isdir(run.path):
        raise CheckpointNotFound(f"{path}: no such run directory")
    try:
        run.check_path()
    except RunPathError as error:
        raise InvalidOption(str(error)) from error
    return run


def checkpoints(run: Run) -> list[CheckpointInfo]:
    """List a run's checkpoints, without those that retention was deleting meanwhile, which only look damaged."""
    return _settled(run.ls())


def _settled(entries: list[CheckpointInfo]) -> list[CheckpointInfo]:
    """Leave out what was deleted while it was read, which only looks damaged."""
    return [entry for entry in entries if entry.damage is None or os.path.lexists(entry.path)]


def find(run: Run, step: str) -> CheckpointInfo:
    """Return the checkpoint that a user named.

    Raises ``CheckpointNotFound`` and ``InvalidOption``, and ``CheckpointDamaged`` where ``latest`` is damaged: nobody
    gets an older checkpoint without having asked for it.
    """
    entry = find_all(run, step)[0]
    if step == LATEST and entry.damage is not None:
        raise refusal(checkpoints(run), entry, f"{entry.path}: {entry.damage}")
    return entry


def name_or_step(found: CheckpointInfo, step: str) -> int | str:
    """Return what means the checkpoint that ``find`` found to ``Run``: its step, or its name where a user gave one."""
    if step in found.names:
        return step
    return found.step if step.isdecimal() or step == LATEST else found.name


def find_all(run: Run, step: str) -> list[CheckpointInfo]:
    """Return the checkpoints that a user named, damaged or not. A step can have a full one, which comes first, and a
    weights-only one; ``latest`` (see ``LATEST_HELP``) is always one checkpoint.

    Raises ``CheckpointNotFound`` and ``InvalidOption``.
    """
    return _choose(run, step, checkpoints(run))


def _choose(run: Run, step: str, entries: list[CheckpointInfo]) -> list[CheckpointInfo]:
    if step == LATEST:
        found = newest(entries)
        if found is None:
            raise CheckpointNotFound(f"{run.path}: the run has no checkpoint of its own here")
        run.tell_of_missing(found)
        return [found]
    named = of_name(step, entries)
    if not step.isdecimal():
        if named is None:
            raise InvalidOption(f"{step!r} is no step and no name here: give a whole number, a name, or 'latest'")
        return [named]
    matches = [entry for entry in entries if entry.step == int(step)]
    if not matches and named is not None:
        return [named]
    if not matches:
        have = ", ".join(str(entry.step) for entry in entries[-10:]) or "none"
        raise CheckpointNotFound(f"{run.path}: no checkpoint of step {step}; the newest steps there: {have}")
    return sorted(matches, key=lambda e: (e.renamed, e.damage is not None, e.kind != "full", -e.sequence))


def _preferred(step: str) -> Preference:
    """Keep the checkpoint open that ``_choose`` puts first, as long as it is usable."""
    if step != LATEST:
        return of_step(int(step) if step.isdecimal() else step)
    return newest_of(None)


def _is_of(error: Exception, entry: CheckpointInfo) -> bool:
    """Whether damage was found in this checkpoint: every such message begins with the path, and ``diff`` reads two."""
    return isinstance(error, CheckpointDamaged) and str(error).startswith((f"{entry.path}:", f"{entry.path}{os.sep}"))


def read(run: Run, step: str, use: Callable[[CheckpointInfo, OpenCheckpoint], T]) -> T:
    """Open the checkpoint that a user named, and return what ``use`` makes of it.

    A live run may delete or replace it between the listing and the reading, which looks like damage; then it is looked
    for again. Raises as ``find`` and ``use`` do.
    """
    for attempt in range(_ATTEMPTS):
        with run.listing(_preferred(step)) as listing:
            entry = _choose(run, step, _settled(listing.entries))[0]
            before = _identity(entry.path)
            try:
                with listing.open(entry) as checkpoint:
                    if step == LATEST and entry.misnamed:
                        raise CheckpointDamaged(f"{entry.path}: {entry.damage}")
                    return use(entry, checkpoint)
            except NewestDamaged:  # ``use`` reads a second checkpoint, and the error is about that one
                raise
            except (CheckpointDamaged, FileNotFoundError) as error:
                stayed = before is not None and _identity(entry.path) == before
                if attempt < _ATTEMPTS - 1 and not stayed:
                    continue
                if step == LATEST and _is_of(error, entry):
                    raise refusal(checkpoints(run), entry, error) from error
                raise
    raise AssertionError("unreachable")


def verified(
    run: Run, entry: CheckpointInfo, expect_digest: str | None = None, require: Sequence[str] = ()
) -> list[Damage] | None:
    """Verify every byte of a checkpoint, with a progress bar on stderr. Return its damage, or None where a live run
    deleted it meanwhile."""
    before = _identity(entry.path)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task(clean(entry.name), total=entry.nbytes or None)
        try:
            damage = run.verify_entry(
                entry,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
                expect_digest=expect_digest,
                require=require,
            )
        except FileNotFoundError:
            return None
    gone = before is None or _identity(entry.path) != before
    return None if damage and gone else damage


def _identity(path: str) -> tuple[int, int] | None:
    """Return what identifies the directory that bears this name now, or None."""
    try:
        info = os.lstat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino


@contextlib.contextmanager
def exits() -> Iterator[None]:
    """Turn this library's errors, and the system's, into one line on stderr and an exit code."""
    try:
        yield
    except BrokenPipeError:  # a reader such as `| head` has seen enough; the framework ends the command quietly
        raise
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
    """Leave with ``code``, after one line on stderr."""
    message = clean("; ".join(line.strip() for line in str(error).splitlines()))
    errors.print(Text.assemble(("error", "red"), f": {message}"), soft_wrap=True)
    raise typer.Exit(int(code))


def clean(text: object) -> str:
    """Return text, which may come from a hostile directory, without the control characters that would move a cursor."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def print_json(value: Any) -> None:
    """Print JSON for programs; nothing else goes to stdout then. Not-a-number and infinities are text, as in the
    manifest."""
    json.dump(_strict(value), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def first_cells(entry: CheckpointInfo) -> tuple[str, ...]:
    """Return what tables of checkpoints begin with: step, name, kind, size, age and metrics."""
    saved = age(entry.created_unix_seconds) if entry.created_unix_seconds else ""
    return str(entry.step), clean(entry.name), entry.kind, size(entry.nbytes), saved, numbers(entry.metrics)


def age(unix_seconds: float) -> str:
    """Say how long ago this was, for people."""
    seconds = max(0.0, time.time() - unix_seconds)
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit} ago"
    return f"{seconds / 86_400:.0f} days ago"


def as_json(entry: CheckpointInfo) -> dict[str, Any]:
    """Return one row of ``ls`` for programs."""
    return {
        "step": entry.step,
        "name": entry.name,
        "path": entry.path,
        "kind": entry.kind,
        "metrics": dict(entry.metrics),
        "annotated": dict(entry.annotated),
        "nbytes": entry.nbytes,
        "created_unix_seconds": entry.created_unix_seconds,
        "pinned": entry.pinned,
        "damage": entry.damage,
        "sequence": entry.sequence,
        "renamed": entry.renamed,
        "parent": entry.parent,
        "abandoned": entry.abandoned,
        "extra": list(entry.extra),
        "names": list(entry.names),
        "derived": entry.derived,
    }


def numbers(metrics: Mapping[str, float]) -> str:
    """Format metrics for people."""
    return " ".join(f"{clean(name)}={value:.6g}" for name, value in metrics.items())
