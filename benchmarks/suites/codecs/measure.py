"""Every contender's ratio and speed are measured on every group, by turns in one process; then what a second thread
adds.

Speeds of one core are over the CPU time of the process, all its threads counted: what else runs on a shared machine
drops out, and a library that starts threads gains nothing. What two threads do is over the time on the clock.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from asyncckpt.codecs import codecs
from asyncckpt.codecs.blosc import Array
from benchmarks.harness.figures import Spread, spread
from benchmarks.suites.codecs.contenders import OURS, Contender, OwnCodec, contenders, one_core
from benchmarks.suites.codecs.groups import Group

#: A second thread is measured on this group: it is the largest part of most checkpoints.
SCALED: Final = ("fp32 weights", "late")
#: A thread encodes the group this many times in one measurement: a tenth of a second, over which a scheduler is fair.
_PASSES: Final = 4
_LEAST_SCALING_ROUNDS: Final = 7


@dataclass(frozen=True, slots=True)
class Measured:
    """Holds the figures of one contender on one group. ``encode`` and ``decode`` are bytes of data a second of CPU
    time."""

    label: str
    ratio: float
    encode: Spread
    decode: Spread


@dataclass(frozen=True, slots=True)
class GroupResult:
    """Holds the figures of every contender on one group at one stage."""

    name: str
    stage: str
    nbytes: int
    item_bytes: int
    bound: float
    measured: Sequence[Measured]

    def of(self, label: str) -> Measured:
        return next(found for found in self.measured if found.label == label)


@dataclass(frozen=True, slots=True)
class Scaling:
    """Compares two threads with one, each with chunks of its own: ``planes``, and SHA-256, which shares nothing, as the
    ceiling of the machine. ``one`` and ``two`` are bytes a second."""

    one: Spread
    two: Spread
    ratio: Spread
    ceiling: Spread


@dataclass(frozen=True, slots=True)
class Results:
    groups: Sequence[GroupResult]
    scaling: Scaling | None
    notes: Sequence[str]

    def of(self, name: str, stage: str) -> GroupResult:
        return next(found for found in self.groups if (found.name, found.stage) == (name, stage))


def measure(groups: Iterable[Group], rounds: int, report: Callable[[str], None]) -> Results:
    """Measure everything. ``groups`` are measured as they come, one in memory at a time; ``report`` is told what
    runs."""
    found: list[GroupResult] = []
    scaling: Scaling | None = None
    notes: dict[str, None] = {}
    for group in groups:
        with one_core():
            report(f"{group.name}, {group.stage}")
            running, missing = contenders(group.item_bytes)
            notes.update(dict.fromkeys(missing))
            found.append(measure_group(group, running, rounds))
            if (group.name, group.stage) == SCALED:
                report("a second thread")
                scaling = measure_scaling(group, max(rounds, _LEAST_SCALING_ROUNDS))
    return Results(found, scaling, list(notes))


def measure_group(group: Group, running: Sequence[Contender], rounds: int) -> GroupResult:
    """Measure all contenders by turns, ``rounds`` times, after a pass that proves them lossless and warms their
    buffers."""
    # each chunk has memory of its own, as a restore fills it, which is touched before it is timed
    places = [np.zeros_like(chunk) for chunk in group.chunks]
    frames = {contender.label: lossless(contender, group.chunks, places) for contender in running}
    encoding: dict[str, list[float]] = {contender.label: [] for contender in running}
    decoding: dict[str, list[float]] = {contender.label: [] for contender in running}
    for turn in range(rounds):
        first = turn % len(running)  # nobody always follows the same neighbour's caches from the start
        for contender in (*running[first:], *running[:first]):
            encoding[contender.label].append(group.nbytes / _encode_seconds(contender, group.chunks))
            seconds = _decode_seconds(contender, frames[contender.label], places)
            decoding[contender.label].append(group.nbytes / seconds)
    measured = [
        Measured(
            label=contender.label,
            ratio=group.nbytes / sum(len(frame) for frame in frames[contender.label]),
            encode=_spread(encoding[contender.label]),
            decode=_spread(decoding[contender.label]),
        )
        for contender in running
    ]
    return GroupResult(group.name, group.stage, group.nbytes, group.item_bytes, group.bound, measured)


def lossless(contender: Contender, chunks: Sequence[Array], places: Sequence[Array]) -> list[bytes]:
    """Return the frames of ``chunks``. Raises ``ValueError`` where a bit is lost, or where the chunk itself was
    changed."""
    frames: list[bytes] = []
    for chunk, place in zip(chunks, places, strict=True):
        before = chunk.tobytes()
        frames.append(bytes(contender.encode(contender.prepare(chunk))))
        place.fill(0)
        if bytes(contender.decode(frames[-1], place)) != before:
            raise ValueError(f"{contender.label} is not lossless on a chunk of {chunk.nbytes} bytes")
        if chunk.tobytes() != before:
            raise ValueError(f"{contender.label} changes the data that it compresses")
    return frames


def measure_scaling(group: Group, rounds: int) -> Scaling:
    """Measure one and two threads by turns. The second works on a copy, so that neither reads what the other has
    cached."""
    copies = [group.chunks, [chunk.copy() for chunk in group.chunks]]
    own = [OwnCodec(codecs.get(OURS), group.item_bytes) for _ in copies]

    def encode(index: int) -> None:
        for chunk in copies[index]:
            own[index].encode(chunk)

    def digest(index: int) -> None:
        for chunk in copies[index]:
            hashlib.sha256(chunk.data).digest()

    nbytes = group.nbytes * _PASSES
    seconds: dict[tuple[Callable[[int], None], int], list[float]] = {}
    for turn in range(rounds + 1):
        for work in (encode, digest):
            for threads in (1, 2):
                took = _threads_seconds(work, threads)
                if turn:  # the first round makes compressors and touches memory
                    seconds.setdefault((work, threads), []).append(took)
    return Scaling(
        one=_spread([nbytes / took for took in seconds[encode, 1]]),
        two=_spread([2 * nbytes / took for took in seconds[encode, 2]]),
        ratio=_times(seconds[encode, 1], seconds[encode, 2]),
        ceiling=_times(seconds[digest, 1], seconds[digest, 2]),
    )


def _threads_seconds(work: Callable[[int], None], threads: int) -> float:
    """Return the seconds from the start of the first thread's work to the end of the last one's."""
    barrier = threading.Barrier(threads)
    spans: list[tuple[float, float]] = []

    def body(index: int) -> None:
        # zstd's compressors belong to a thread: they are made, and the core is woken, before the clock starts
        work(index)
        barrier.wait()
        began = time.perf_counter()
        for _ in range(_PASSES):
            work(index)
        spans.append((began, time.perf_counter()))

    pool = [threading.Thread(target=body, args=(index,)) for index in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    if len(spans) != threads:
        raise RuntimeError("a thread of the measurement failed; its error is above")
    return max(end for _, end in spans) - min(began for began, _ in spans)


def _encode_seconds(contender: Contender, chunks: Sequence[Array]) -> float:
    seconds = 0.0
    for chunk in chunks:
        prepared = contender.prepare(chunk)
        began = time.process_time()
        contender.encode(prepared)
        seconds += time.process_time() - began
    return seconds


def _decode_seconds(contender: Contender, frames: Sequence[bytes], places: Sequence[Array]) -> float:
    began = time.process_time()
    for frame, place in zip(frames, places, strict=True):
        contender.decode(frame, place)
    return time.process_time() - began


def _times(one: Sequence[float], two: Sequence[float]) -> Spread:
    """Divide the throughput of two threads by that of one, its neighbour in time."""
    return _spread([2 * a / b for a, b in zip(one, two, strict=True)])


def _spread(values: Sequence[float]) -> Spread:
    found = spread(values)
    if found is None:
        raise ValueError("nothing was measured: rounds must be at least 1")
    return found
