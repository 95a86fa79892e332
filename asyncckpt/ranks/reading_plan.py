"""Of what several ranks restore alike, this says who reads which extents, and in which order they are passed on.

The plan is a pure function of what each rank wants, so all ranks compute the same one and send no more messages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from asyncckpt.memory.buffers import padded

#: A message takes neighbouring extents up to this many bytes, or one extent that is larger.
MESSAGE_BYTES: Final = 8 << 20
#: In one phase, each rank reads up to this many bytes before it passes them on.
PART_BYTES: Final = 64 << 20
#: Extents lie in a message as they lie in their file, modulo this many bytes.
_ALIGNMENT_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class Message:
    """The rank ``owner`` reads these ``extents``, which are numbers, and passes them on to ``receivers``. Extent
    ``extents[i]`` begins ``places[i]`` bytes after the message's first byte; the message has ``nbytes`` bytes."""

    owner: int
    receivers: tuple[int, ...]
    extents: tuple[int, ...]
    places: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class ReadingPlan:
    """Says how ranks read together. ``phases``: the messages of each phase, in the order in which all ranks pass them
    on. ``alone``: the numbers of the extents that this rank alone wants, or that it was not worth sharing."""

    phases: tuple[tuple[Message, ...], ...]
    alone: tuple[int, ...]

    def largest_message(self) -> int:
        """Return the bytes of the largest message."""
        return max((message.nbytes for phase in self.phases for message in phase), default=0)

    def part_bytes(self, ranks: int) -> list[int]:
        """Return the bytes of each rank's largest part, each message of it rounded up to whole pages."""
        largest = [0] * ranks
        for phase in self.phases:
            sums = [0] * ranks
            for message in phase:
                sums[message.owner] += padded(message.nbytes)
            largest = [max(pair) for pair in zip(largest, sums, strict=True)]
        return largest


def shared_bytes(sizes: NDArray[np.int64], wanted: NDArray[np.bool_]) -> int:
    """Return how many bytes more than one rank wants. ``sizes``: of each extent, in bytes, shape ``[extents]``.
    ``wanted``: which rank wants which extent, shape ``[ranks, extents]``."""
    return int(sizes[wanted.sum(axis=0) > 1].sum())


def plan_reading(
    sizes: NDArray[np.int64], offsets: NDArray[np.int64], wanted: NDArray[np.bool_], rank: int
) -> ReadingPlan:
    """Divide what several ranks want evenly among them, in stretches of neighbouring extents. Pure.

    ``offsets``: of each extent in its file, in bytes; the other arrays are those of ``shared_bytes``."""
    holders = wanted.sum(axis=0)
    shared = np.flatnonzero(holders > 1)
    alone = tuple(np.flatnonzero(wanted[rank] & (holders == 1)).tolist())
    by_owner: dict[int, list[Message]] = {}
    if len(shared):
        columns = np.packbits(wanted[:, shared], axis=0)
        _, first, group_of = np.unique(columns, axis=1, return_index=True, return_inverse=True)
        for group in range(len(first)):
            numbers = shared[group_of.reshape(-1) == group]
            members = np.flatnonzero(wanted[:, numbers[0]])
            members = np.roll(members, -group)  # so that small groups do not all begin with the same rank
            owners = members[_stretches(sizes[numbers], len(members))]
            for owner, found in itertools.groupby(zip(owners.tolist(), numbers.tolist(), strict=True), lambda p: p[0]):
                receivers = tuple(sorted(member for member in members.tolist() if member != owner))
                stretch = [number for _, number in found]
                by_owner.setdefault(owner, []).extend(_messages(owner, receivers, stretch, sizes, offsets))
    return ReadingPlan(tuple(_phases(by_owner)), alone)


def _stretches(sizes: NDArray[np.int64], parts: int) -> NDArray[np.int64]:
    """Return for each extent which of ``parts`` stretches it belongs to; all have about as many bytes."""
    ends = np.cumsum(sizes)
    middles = ends - sizes / 2
    return np.minimum((middles * parts / max(1, int(ends[-1]))).astype(np.int64), parts - 1)


def _messages(
    owner: int,
    receivers: tuple[int, ...],
    numbers: Sequence[int],
    sizes: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> Iterator[Message]:
    extents: list[int] = []
    places: list[int] = []
    end = 0
    for number in numbers:
        size, place = int(sizes[number]), _place(end, int(offsets[number]))
        if extents and place + size > MESSAGE_BYTES:
            yield Message(owner, receivers, tuple(extents), tuple(places), end)
            extents, places, place = [], [], _place(0, int(offsets[number]))
        extents.append(number)
        places.append(place)
        end = place + size
    if extents:
        yield Message(owner, receivers, tuple(extents), tuple(places), end)


def _place(end: int, offset: int) -> int:
    """Return the first place from ``end`` on that is aligned as the offset is."""
    return end + (offset - end) % _ALIGNMENT_BYTES


def _phases(by_owner: dict[int, list[Message]]) -> Iterator[tuple[Message, ...]]:
    """Cut each owner's messages into parts. The owners of a phase take turns, so that all of them send at a time."""
    parts = {owner: list(_parts(messages)) for owner, messages in sorted(by_owner.items())}
    for phase in itertools.zip_longest(*parts.values(), fillvalue=()):
        turns = itertools.zip_longest(*phase)
        yield tuple(message for turn in turns for message in turn if message is not None)


def _parts(messages: Sequence[Message]) -> Iterator[list[Message]]:
    part: list[Message] = []
    nbytes = 0
    for message in messages:
        if part and nbytes + message.nbytes > PART_BYTES:
            yield part
            part, nbytes = [], 0
        part.append(message)
        nbytes += message.nbytes
    if part:
        yield part
