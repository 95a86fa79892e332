"""DeepSpeed thinks in tags, which are directories of files. Of ours each file of a tag is a small text that says which
run has the checkpoint; ``latest`` is DeepSpeed's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

from asyncckpt.errors import CheckpointNotFound, InvalidOption
from asyncckpt.integrations.name_files import name_text, read_names
from asyncckpt.integrations.whole_files import write_whole
from asyncckpt.run import Run
from asyncckpt.storage.posix import PosixOps

#: The folder of a run. A training that goes back to an earlier step than the run has reached gets a run of its own,
#: with a number at the end, so that no checkpoint takes another one's place.
FOLDER: Final = "asyncckpt-run"
LATEST: Final = "latest"
_KIND: Final = "asyncckpt-deepspeed"
_ABOUT: Final = (
    "This is no torch file: it names a checkpoint of the run beside its directory. Load it with an engine that "
    "asyncckpt.integrations.deepspeed.attach was called on, or make DeepSpeed's files with its export."
)


@dataclass(frozen=True, slots=True)
class Place:
    """Says where the file ``name`` of a tag is stored: in the checkpoint ``tag`` of the run ``run``."""

    run: Path
    tag: str
    name: str


def check_tag(tag: str) -> None:
    """Raise ``InvalidOption`` for a tag that is no name of a directory beside the run."""
    if tag != os.path.basename(tag) or tag in ("", ".", "..") or tag.startswith(FOLDER) or tag == LATEST:
        raise InvalidOption(f"tag {tag!r}: choose one without a slash, and not {FOLDER!r} or {LATEST!r}")


def folder_for(directory: Path, step: int) -> tuple[str, int]:
    """Return the folder of the run that a save of ``step`` goes to, and the step that it has reached: -1 where there is
    no run yet. Blocks on the disk."""
    for number in count(1):
        folder = FOLDER if number == 1 else f"{FOLDER}-{number}"
        reached = newest_step(directory / folder)
        later = (directory / f"{FOLDER}-{number + 1}").is_dir()
        if not later and reached <= step:
            return folder, reached
        if not later:
            return f"{FOLDER}-{number + 1}", -1
    raise AssertionError("unreachable")


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint of a run; -1 where it has none, or is not there."""
    if not run.is_dir():
        return -1
    try:
        return Run(run).newest().step
    except CheckpointNotFound:
        return -1


def read_place(path: Path) -> Place | None:
    """Return where a file of a tag is stored; None where it is no file of ours, or there is none. Raises
    ``RunPathError`` for one that is damaged, or of a version that is unknown."""
    found = read_names(path, _KIND, ("run", "tag", "file"))
    if found is None:
        return None
    run, tag, name = found
    return Place(path.parent.parent / run, tag, name)


def foreign_files(directory: Path, tag: str) -> list[str]:
    """List what lies in a tag's directory and is not ours."""
    try:
        return sorted(name for name in os.listdir(directory / tag) if read_place(directory / tag / name) is None)
    except FileNotFoundError:
        return []


def publish(directory: Path, tag: str, run: str, names: Sequence[str], *, latest: bool) -> None:
    """Make a tag visible, whose checkpoint is durable: its files, and then ``latest``. Blocks on the disk."""
    there = directory / tag
    there.mkdir(exist_ok=True)
    for name in names:
        text = name_text(_KIND, _ABOUT, run=run, tag=tag, file=name)
        write_whole(there / name, lambda file, text=text: file.write(text), durable=True)  # type: ignore[misc]
    for name in set(os.listdir(there)) - set(names):  # of a save of this tag with more ranks
        if read_place(there / name) is not None:
            (there / name).unlink()
    PosixOps().fsync_directory(str(directory))
    if latest:
        write_whole(directory / LATEST, lambda file: file.write(tag.encode()), durable=True)


def remove_dangling(directory: Path, run: str, kept: Iterable[str]) -> None:
    """Take the files of those tags away whose checkpoints retention has deleted. ``kept``: the names that the run's
    checkpoints have. Blocks on the disk."""
    names = set(kept)
    for entry in list(os.scandir(directory)):
        if not entry.is_dir(follow_symlinks=False) or entry.name in names or entry.name.startswith(FOLDER):
            continue
        removed = 0
        for name in os.listdir(entry.path):
            place = read_place(Path(entry.path) / name)
            if place is not None and place.run.name == run and place.tag not in names:
                (Path(entry.path) / name).unlink()
                removed += 1
        if removed:
            with contextlib.suppress(OSError):
                os.rmdir(entry.path)
