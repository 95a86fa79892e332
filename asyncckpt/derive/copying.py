"""``copy`` makes verified copies of checkpoints in another run directory."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.commit.file_copy import copy_file
from asyncckpt.commit.publication import publish_as_it_is, take_over
from asyncckpt.commit.room import make_room
from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound, InvalidOption, StepExists, storage_errors
from asyncckpt.manifest.json import FILE_NAME, MAX_MANIFEST_BYTES
from asyncckpt.protocols import Store
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.run import Run
from asyncckpt.storage import open_store

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Copied:
    """Tells of one checkpoint of ``copy``: its directory's name and ``path`` there, its size ``nbytes`` in bytes, and
    whether it was ``there`` already, as it is."""

    step: int
    name: str
    path: str
    nbytes: int
    there: bool


def copy(
    run: str | os.PathLike[str],
    to: str | os.PathLike[str],
    steps: Sequence[int | str] = (),
    *,
    progress: Progress | None = None,
) -> list[Copied]:
    """Copy checkpoints of a run to the run directory ``to``, on whatever storage, the oldest first.

    ``steps``: which (default: every usable one of the run's own). Every byte is verified before it is written; each
    copy gets its name once all of it is durable, and has the very manifest of the original, so `expect_digest` holds
    for both. What was annotated goes along, pins do not. ``to`` is made where only its last part is missing. One that
    is there already with the same manifest is left as it is, so a call that was cut off can be made again.

    The run may be written meanwhile; ``to`` may not. Damaged checkpoints and copies that somebody has renamed are left
    out, or, if they are named in ``steps``, refused. Blocks; ``progress(done_bytes, total_bytes)`` is called after each
    file. Raises ``CheckpointNotFound``, ``CheckpointDamaged``, ``StepExists`` (another checkpoint has that name there),
    ``InvalidOption``, ``RunLocked``, ``RunPathError``, ``NotEnoughSpace`` and ``StorageFailed``."""
    reading, target = Run(run), open_store(to)
    if target.address == reading.path:
        raise InvalidOption(f"{reading.path}: a run cannot be copied to itself")
    if isinstance(steps, str):
        raise InvalidOption(f"steps must be a list of steps or names, not {steps!r:.80}")
    entries = _entries(reading, steps)
    with storage_errors(target.address), contextlib.ExitStack() as stack:
        held = take_over(target)
        stack.callback(held.release)
        count = _Count(sum(entry.nbytes for entry in entries), progress)
        return [_copy(reading, entry, target, held.check, count) for entry in entries]


class _Count:
    """Counts the bytes that are copied."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._done = 0
        self._progress = progress

    def add(self, nbytes: int) -> None:
        """Tell of so many more bytes."""
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _entries(run: Run, steps: Sequence[int | str]) -> list[CheckpointInfo]:
    rows = run.ls()
    if not steps:
        found = [entry for entry in rows if entry.damage is None and not entry.renamed]
        if not found:
            raise CheckpointNotFound(f"{run.path}: no usable checkpoint here")
        return found
    catalog = Catalog(run._store, run.path)
    chosen = [catalog.find(step) for step in dict.fromkeys(steps)]
    for entry in chosen:
        if entry.damage is not None:
            raise CheckpointDamaged(f"{entry.path}: {entry.damage}. Nothing was copied")
        if entry.renamed:
            raise InvalidOption(f"{entry.path} is a copy, or was renamed; nothing was copied. Copy the original")
    place = {entry.name: number for number, entry in enumerate(rows)}
    return sorted({entry.name: entry for entry in chosen}.values(), key=lambda entry: place.get(entry.name, -1))


def _copy(run: Run, entry: CheckpointInfo, target: Store, check: Callable[[], None], count: _Count) -> Copied:
    with run.open_entry(entry) as source:
        manifest = source.manifest
        data = source.reader.read_small(FILE_NAME, MAX_MANIFEST_BYTES)
        copied = Copied(entry.step, entry.name, f"{target.address}/{entry.name}", manifest.nbytes, False)
        if target.identity(entry.name) is not None:
            _check_same(target, source, data)
            count.add(manifest.nbytes)
            _annotate(target, entry)
            return Copied(copied.step, copied.name, copied.path, copied.nbytes, True)
        make_room(target, manifest.nbytes, entry.step, 0, lambda: None)
        directory = target.begin(entry.step, uuid.uuid4().hex, name=entry.name)
        try:
            for record in manifest.files:
                count.add(copy_file(directory, source.reader, manifest, record))
            publish_as_it_is(directory, manifest, data, before=check)
        except BaseException:
            directory.discard()
            raise
        count.add(len(data))
    _annotate(target, entry)
    return copied


def _check_same(target: Store, source: OpenCheckpoint, data: bytes) -> None:
    """Raise ``StepExists`` unless what has the checkpoint's name there has its manifest, too."""
    name = source.name
    try:
        with contextlib.closing(target.open(name)) as reader:
            same = reader.read_small(FILE_NAME, MAX_MANIFEST_BYTES) == data
    except (CheckpointDamaged, CheckpointNotFound):
        same = False
    if not same:
        raise StepExists(
            f"{target.address}/{name} is there and is another checkpoint than {source.path}; it was left as it is. "
            f"Copy to another directory, or move that one away"
        )


def _annotate(target: Store, entry: CheckpointInfo) -> None:
    if entry.annotated:
        catalog = Catalog(target, target.address)
        there = catalog.annotations.all().get(entry.attempt)
        if there is None or dict(there.metrics) != dict(entry.annotated):
            catalog.annotations.add(entry.attempt, entry.annotated)
