"""Ranks that restore the same bytes read them once between them: each reads a part and passes it on to the others.

All ranks tell each other what they want, and compute one plan of it. Then, phase by phase, each reads and verifies its
part and places it; all agree, through the job's store, that their parts are good; and only then bytes pass. So whoever
finds damage, or has died or hangs in reading, leaves nobody in a collective.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from asyncckpt import interrupts
from asyncckpt.codecs import digests
from asyncckpt.errors import CheckpointDamaged, NotEnoughMemory, RestoreFailed
from asyncckpt.manifest.records import ExtentRecord, FileRecord, Manifest
from asyncckpt.memory.buffers import padded
from asyncckpt.protocols import Reader
from asyncckpt.ranks.host_memory import HostMemory
from asyncckpt.ranks.passing import Passing
from asyncckpt.ranks.placing import STOPPING_SECONDS, Placing, Slots, memory_of
from asyncckpt.ranks.reading_plan import Message, ReadingPlan, plan_reading, shared_bytes
from asyncckpt.read.damage import Damage
from asyncckpt.read.extents import Consume, Extents, read_extents
from asyncckpt.storage.lease import boot_id

#: It exchanges a message with all ranks, within the restore's present stage, and returns everybody's by rank.
Exchange = Callable[[Any], list[Any]]


class _Way(NamedTuple):
    """How bytes come from rank to rank: through the process group that all have, if any, and where all are on
    ``one_host``, rather through its memory."""

    passing: Passing | None
    one_host: bool


class SharedReading:
    """Reads extents together with the other ranks of the job. For one restore, on its thread.

    ``least_bytes``: where ranks want fewer bytes alike, each reads all of its own."""

    def __init__(self, rank: int, size: int, exchange: Exchange, *, least_bytes: int, timeout_seconds: float) -> None:
        self._rank, self._size = rank, size
        self._exchange = exchange
        self._least_bytes = least_bytes
        self._timeout_seconds = timeout_seconds

    def read(self, reader: Reader, manifest: Manifest, wanted: Extents, consume: Consume) -> list[Damage]:
        """Read, verify and consume extents as ``read_extents`` does: every rank has to call, with what it wants itself.

        Blocks for the others. Raises also ``RankLost``, what another rank raises meanwhile, and ``RestoreFailed`` where
        what another rank has passed on is not what it read."""
        if manifest.parts is not None:
            return self._read_alike(reader, manifest, wanted, consume)
        every = [(file, extent) for file in manifest.files for extent in file.extents]
        numbers = {(file.name, extent.offset): number for number, (file, extent) in enumerate(every)}
        mine = np.zeros(len(every), np.bool_)
        mine[[numbers[file.name, extent.offset] for file, extent in wanted]] = True
        passing = Passing.of_job(self._rank, self._size, self._timeout_seconds)
        kind = passing.kind if passing is not None else ""
        bodies = self._exchange({"wants": np.packbits(mine).tobytes().hex(), "by": kind, "host": boot_id()})
        everybodys = _everybodys([body["wants"] for body in bodies], len(every))
        sizes = np.fromiter((extent.nbytes for _, extent in every), np.int64, len(every))
        alike = shared_bytes(sizes, everybodys)
        here = all(body["host"] == bodies[0]["host"] for body in bodies)
        together = bool(kind) and all(body["by"] == kind for body in bodies)
        if not (here or together) or alike < max(1, self._least_bytes):
            return read_extents(reader, manifest.digest, wanted, consume)
        offsets = np.fromiter((extent.offset for _, extent in every), np.int64, len(every))
        plan = plan_reading(sizes, offsets, everybodys, self._rank)
        way = _Way(passing if together else None, here)
        return self._carry_out(reader, manifest, every, plan, wanted, consume, way)

    def _read_alike(self, reader: Reader, manifest: Manifest, wanted: Extents, consume: Consume) -> list[Damage]:
        """Read from a checkpoint whose manifest is in parts, of which each rank knows those that it needs: ranks that
        want the very same extents, such as the copies of HSDP, read them once between them."""
        every = sorted(wanted, key=lambda pair: (pair[0].name, pair[1].offset))
        sizes = np.fromiter((extent.nbytes for _, extent in every), np.int64, len(every))
        text = "".join(f"{file.name}\0{extent.offset}\0" for file, extent in every).encode()
        passing = Passing.of_job(self._rank, self._size, self._timeout_seconds)
        mine = {
            "wants": digests.get(digests.DEFAULT)(text),
            "nbytes": int(sizes.sum()),
            "by": passing.kind if passing is not None else "",
            "host": boot_id(),
        }
        bodies = self._exchange(mine)
        here = all(body["host"] == bodies[0]["host"] for body in bodies)
        together = bool(bodies[0]["by"]) and all(body["by"] == bodies[0]["by"] for body in bodies)
        counts = Counter(body["wants"] for body in bodies)
        worth = {body["wants"] for body in bodies if body["nbytes"] >= max(1, self._least_bytes)}
        shared = {wants for wants in worth if counts[wants] > 1}
        if not shared or not (here or together):
            return read_extents(reader, manifest.digest, wanted, consume)
        plan = ReadingPlan((), tuple(range(len(every))))
        if mine["wants"] in shared:
            everybodys = np.zeros((self._size, len(every)), np.bool_)
            everybodys[[rank for rank, body in enumerate(bodies) if body["wants"] == mine["wants"]]] = True
            offsets = np.fromiter((extent.offset for _, extent in every), np.int64, len(every))
            plan = plan_reading(sizes, offsets, everybodys, self._rank)
        phases = max(self._exchange(len(plan.phases)))  # all agree to each, whoever it is of
        plan = ReadingPlan(plan.phases + ((),) * (phases - len(plan.phases)), plan.alone)
        way = _Way(passing if together else None, here)
        return self._carry_out(reader, manifest, every, plan, wanted, consume, way)

    def _carry_out(
        self,
        reader: Reader,
        manifest: Manifest,
        every: Extents,
        plan: ReadingPlan,
        wanted: Extents,
        consume: Consume,
        way: _Way,
    ) -> list[Damage]:
        """Read as ``plan`` says; each rank all that it wants, where bytes can take no way."""
        memory = self._host_memory(plan) if way.one_host else None
        try:
            if memory is None and way.passing is None:
                return read_extents(reader, manifest.digest, wanted, consume)
            run = _Run(reader, manifest, every, plan, consume, way.passing, memory, self._rank)
            return run.carry_out(lambda: self._exchange(None))
        finally:
            if memory is not None:
                memory.close()

    def _host_memory(self, plan: ReadingPlan) -> HostMemory | None:
        """Return memory that all ranks, which are on one host, can map; None where one of them cannot."""
        memory: HostMemory | None = None
        with contextlib.suppress(OSError, MemoryError, ValueError):
            memory = HostMemory(self._rank, plan.part_bytes(self._size))
        good = False
        try:
            found = self._exchange(memory.description() if memory is not None else None)
            mapped = memory is not None and None not in found and memory.map_others(found)
            good = all(self._exchange(mapped))
        finally:
            if memory is not None and not good:
                memory.close()
        return memory if good else None


class _Run:
    """Carries out one plan on this rank."""

    def __init__(
        self,
        reader: Reader,
        manifest: Manifest,
        every: Extents,
        plan: ReadingPlan,
        consume: Consume,
        passing: Passing | None,
        memory: HostMemory | None,
        rank: int,
    ) -> None:
        self._reader = reader
        self._manifest = manifest
        self._every = every
        self._plan = plan
        self._consume = consume
        self._passing = passing
        self._memory = memory
        self._rank = rank

    def carry_out(self, agree: Callable[[], object]) -> list[Damage]:
        """Read this rank's parts and pass them on; return the damage, as soon as some was found. ``agree``: returns
        once every rank has read its part."""
        phases = self._plan.phases
        parts = [[message for message in phase if message.owner == self._rank] for phase in phases]
        slots: Slots | None = None
        try:
            if self._memory is not None:
                buffers = [self._memory.part(0), self._memory.part(1)]
            else:
                largest = max((sum(padded(message.nbytes) for message in part) for part in parts), default=0)
                buffers = [memory_of(largest) for _ in range(min(2, len(phases)))]
                slots = Slots(self._passing, self._plan.largest_message()) if self._passing is not None else None
        except (OSError, MemoryError, torch.OutOfMemoryError) as error:
            what = f"{self._reader.path}: no memory to read together with other ranks ({error})"
            raise NotEnoughMemory(what) from error
        reading = _Reading(self._read_part, parts[0], buffers[0])
        try:
            for number, phase in enumerate(phases):
                damage = reading.result()
                if damage:
                    return damage
                agree()
                sent = reading.memory
                if number + 1 < len(phases):
                    reading = _Reading(self._read_part, parts[number + 1], buffers[(number + 1) % 2])
                if self._memory is not None:
                    self._take(number, phase, self._memory)
                elif self._passing is not None and slots is not None:
                    self._pass(phase, sent, self._passing, slots)
        finally:
            reading.wait(STOPPING_SECONDS)
        return self._read_alone()

    def _read_alone(self) -> list[Damage]:
        alone = [self._every[number] for number in self._plan.alone]
        return read_extents(self._reader, self._manifest.digest, alone, self._consume)

    def _read_part(self, part: Sequence[Message], buffer: torch.Tensor) -> tuple[list[Damage], dict[int, torch.Tensor]]:
        """Read the extents of messages, place them, and lay them into the messages. Return the damage, and each
        message's memory by the number of its first extent."""
        memory: dict[int, torch.Tensor] = {}
        places: dict[tuple[str, int], memoryview] = {}
        begin = 0
        for message in part:
            memory[message.extents[0]] = found = buffer[begin : begin + message.nbytes]
            view = _bytes(found)
            for number, place in zip(message.extents, message.places, strict=True):
                file, extent = self._every[number]
                places[file.name, extent.offset] = view[place : place + extent.nbytes]
            begin += padded(message.nbytes)

        def keep(file: FileRecord, extent: ExtentRecord, view: memoryview) -> None:
            places[file.name, extent.offset][:] = view
            self._consume(file, extent, view)

        wanted = [self._every[number] for message in part for number in message.extents]
        return read_extents(self._reader, self._manifest.digest, wanted, keep), memory

    def _take(self, number: int, phase: Sequence[Message], memory: HostMemory) -> None:
        """Place what the other ranks have read in a phase. They read into the same memory again two phases later, which
        begins once every rank has agreed to the phase in between."""
        with Placing(memory, None, self._rank, self._place) as placing:
            for ticket, host in memory.received(number, phase):
                placing.take(ticket, host, None)
            placing.finish()

    def _pass(self, phase: Sequence[Message], sent: dict[int, torch.Tensor], passing: Passing, slots: Slots) -> None:
        """Send this rank's messages of a phase, receive and place the others'. Signals wait until that is done, because
        others would wait for this rank."""
        with interrupts.deferred(), Placing(passing, slots, self._rank, self._place) as placing:
            for message in phase:
                if message.owner == self._rank:
                    host = sent[message.extents[0]]
                    memory = passing.memory(message.nbytes, host)
                    placing.take(passing.begin(message, memory, host), host, None)
                elif self._rank in message.receivers:
                    slot = placing.slot()
                    placing.take(passing.begin(message, slot.memory, slot.host), slot.host, slot)
            placing.finish()

    def _place(self, message: Message, host: torch.Tensor) -> None:
        """Put what was received where it belongs; what has travelled is verified before."""
        view = _bytes(host)
        digest = digests.get(self._manifest.digest)
        for number, place in zip(message.extents, message.places, strict=True):
            file, extent = self._every[number]
            data = view[place : place + extent.nbytes]
            if self._memory is None and digest(data) != extent.digest:
                raise RestoreFailed(
                    f"{self._reader.path}/{file.name} [{extent.offset}:{extent.offset + extent.nbytes}]: rank "
                    f"{message.owner} has read it well, and other bytes came to rank {self._rank}: look at the network"
                )
            try:
                self._consume(file, extent, data)
            except CheckpointDamaged as error:
                damage = Damage(file.name, extent.offset, extent.nbytes, str(error))
                raise CheckpointDamaged(f"{self._reader.path}: {damage}.") from error


class _Reading:
    """Reads one part on a thread of its own, so that the part before can be passed on meanwhile."""

    def __init__(
        self,
        read: Callable[[Sequence[Message], torch.Tensor], tuple[list[Damage], dict[int, torch.Tensor]]],
        part: Sequence[Message],
        buffer: torch.Tensor,
    ) -> None:
        self.memory: dict[int, torch.Tensor] = {}
        self._damage: list[Damage] = []
        self._error: BaseException | None = None
        self._ended = threading.Event()

        def work() -> None:
            try:
                self._damage, self.memory = read(part, buffer)
            except BaseException as error:
                self._error = error
            finally:
                self._ended.set()

        threading.Thread(target=work, name="asyncckpt-part", daemon=True).start()

    def result(self) -> list[Damage]:
        """Block until the part was read; return the damage. Raises what the reading raised."""
        interrupts.wait_for(self._ended.wait, None)
        if self._error is not None:
            raise self._error
        return self._damage

    def wait(self, seconds: float) -> None:
        """Block until the thread writes no more, for so long at most."""
        self._ended.wait(seconds)


def _bytes(memory: torch.Tensor) -> memoryview:
    found: Any = memory.numpy()
    return memoryview(found)


def _everybodys(wants: Sequence[str], extents: int) -> NDArray[np.bool_]:
    """Return which rank wants which extent, shape ``[ranks, extents]``."""
    rows = [np.frombuffer(bytes.fromhex(text), np.uint8) for text in wants]
    return np.unpackbits(np.stack(rows), axis=1, count=extents).astype(np.bool_)
