"""A job settles with the other ranks, on the training thread, everything but the writing itself.

Opening, planning and restoring are settled by everyone; a save that the clock or a signal calls for is announced by
rank 0 some steps ahead, so that nobody waits for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any, Final

from asyncckpt.catalog.listing import CheckpointInfo, Listing
from asyncckpt.errors import AsyncCkptError, RanksDisagree, RestoreFailed, RunPathError, StorageFailed
from asyncckpt.manifest.records import Manifest
from asyncckpt.protocols import Reader, Store
from asyncckpt.ranks.announcements import Announcements
from asyncckpt.ranks.collective_save import RankSave
from asyncckpt.ranks.planner import JobPlanner
from asyncckpt.ranks.shared_reading import SharedReading
from asyncckpt.ranks.store import RankStore, error_from_json, error_to_json
from asyncckpt.read.damage import Damage
from asyncckpt.read.extents import Consume, Extents
from asyncckpt.restore.carrying_out import Stages
from asyncckpt.storage.lease import boot_id

#: On a network file system, a file that another host has just written may stay invisible for so long.
_VISIBLE_SECONDS: Final = 30.0
#: How long rank 0 stays for ranks that have not closed yet.
_FAREWELL_SECONDS: Final = 5.0
#: Ranks learn this of each checkpoint that rank 0 has found.
_SHARED: Final = ("step", "name", "kind", "damage", "attempt", "renamed", "misnamed", "sequence")


@dataclass(frozen=True, slots=True)
class Known:
    """Describes a checkpoint that was there when the run was opened; see ``CheckpointInfo``."""

    step: int
    kind: str
    name: str
    sequence: int
    damaged: bool
    renamed: bool
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, entry: CheckpointInfo) -> Known:
        damaged = entry.damage is not None
        foreign = entry.renamed or entry.beside  # its name is taken, its step is not
        return cls(entry.step, entry.kind, entry.name, entry.sequence, damaged, foreign, entry.names)


class Coordinator:
    """Settles things with the other ranks of the job. For the training thread. Calls that need the others wait for them
    at most ``RankOptions.timeout_seconds``, then raise ``RankLost``."""

    def __init__(self, ranks: RankStore, planner: JobPlanner) -> None:
        self.ranks = ranks
        self.planner = planner
        self._session = ""
        self._number = -1
        #: How many ranks run on this host, this one included; known once the run is open.
        self.ranks_here = 1
        self.announcements = Announcements(ranks)
        #: See ``RankSave``.
        self.asked_again: set[int] = set()
        #: What all ranks' options together say, as of the last thing done together.
        self.shared_reading_bytes: int | None = None
        #: What ``exchange`` has raised last: no rank has to be told of it.
        self._known_to_all: BaseException | None = None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which holds the lease and publishes."""
        return self.ranks.rank == 0

    def open(self, store: Store, lead: Callable[[], tuple[str, list[CheckpointInfo]]]) -> list[Known]:
        """Open the run on all ranks: rank 0 runs ``lead``, which takes the lease and returns its owner and the
        checkpoints that are there; every rank makes sure that it sees the same directory, and returns the checkpoints.
        Blocks for the others. Raises on every rank what went wrong on one, and ``RunPathError`` where a rank sees
        another directory."""
        body: dict[str, Any] = {}
        own: BaseException | None = None
        if self.leads:
            try:
                owner, entries = lead()
                known = [astuple(Known.of(entry)) for entry in entries]
                body = {"session": uuid.uuid4().hex, "owner": owner, "known": known}
            except BaseException as error:
                body, own = {"error": error_to_json(error)}, error
        bodies = self.ranks.agree("open", body | {"host": boot_id()})
        answer = bodies[0]
        self.ranks_here = sum(one["host"] == boot_id() for one in bodies)
        if own is not None:
            raise own
        if "error" in answer:
            raise error_from_json(answer["error"], "rank 0")
        with self.together("see the run directory", StorageFailed):
            _wait_visible(store, answer["owner"], self.ranks.rank)
        self._session = answer["session"]
        return [replace(Known(*row), names=tuple(row[-1])) for row in answer["known"]]

    def close(self) -> None:
        """Tell the others that this rank is done. Rank 0 waits for them a few seconds at most: the store may end with
        its process. Never raises."""
        with contextlib.suppress(RuntimeError, AsyncCkptError):
            if self.leads:
                self.ranks.post("closed/0", True)
                self.ranks.gather("closed", _FAREWELL_SECONDS, "close")
            else:
                self.ranks.post(f"closed/{self.ranks.rank}", True)

    # -- saves -------------------------------------------------------------------------------------------------------

    def next_save(self) -> int:
        """Count a call of ``save``, and return its number. It is the same on every rank, whatever becomes of the
        call."""
        self._number += 1
        return self._number

    def attempt(self, number: int) -> str:
        """Return a save's attempt uuid. It follows from rank 0's session and the number, so it never has to be sent."""
        return hashlib.sha256(f"{self._session}/{number}".encode()).hexdigest()[:32]

    def give_up(self, number: int, error: BaseException) -> None:
        """Tell the others that this rank's call of ``save`` failed before it wrote anything: they need not wait for
        it, neither to plan and to redistribute nor to publish. Never raises."""
        rank_save = RankSave(self.ranks, number, {}, frozenset())
        key = rank_save.outcome if self.leads else f"{rank_save.reports}/{self.ranks.rank}"
        with contextlib.suppress(RuntimeError, AsyncCkptError):
            self.planner.decline(f"save/{number}", error)
            self.ranks.post(key, {"error": error_to_json(error)})

    def replan(self, number: int) -> str:
        """Tell rank 0 that this rank cannot save without a new plan. Returns the key of the save's outcome: once that
        is there, no plan will come."""
        rank_save = RankSave(self.ranks, number, {}, frozenset())
        if not self.leads:
            self.ranks.post(rank_save.replan(self.ranks.rank), True)
        return rank_save.outcome

    def any_rank(self, what: str, here: bool) -> bool:
        """Whether ``here`` is true on some rank. Every rank has to call; blocks until all have."""
        return any(self.ranks.agree(what, here))

    # -- together ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self, what: str, otherwise: type[AsyncCkptError] = RestoreFailed) -> Iterator[None]:
        """Run the body on all ranks, and wait until all have; an error on one is raised on all. One that is no error of
        this library is one of the type ``otherwise`` on the others."""
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
        if error is not None and error is self._known_to_all:
            raise error
        least = {"shared_reading_bytes": self.ranks.options.shared_reading_bytes}
        bodies = self.ranks.agree("stage", least if error is None else {"error": error_to_json(error)})
        if error is not None:
            raise error
        _raise_first(bodies, otherwise)
        asked = [body["shared_reading_bytes"] for body in bodies]
        self.shared_reading_bytes = None if None in asked else max(asked)

    def exchange(self, body: Any, otherwise: type[AsyncCkptError] = RestoreFailed) -> list[Any]:
        """Exchange messages in the middle of the body of ``together``, where every rank has to call this as often;
        returns everybody's by rank. Where a rank's body has raised instead, raises that here, as ``together`` does."""
        try:
            bodies = self.ranks.agree("stage", {"body": body})
            _raise_first(bodies, otherwise)
        except BaseException as error:
            self._known_to_all = error
            raise
        return [one["body"] for one in bodies]

    def share_listing(self, listing: Listing | None, asked: int | str | None, store: Store) -> Listing:
        """Return what rank 0 has found, on every rank: no other looks at the run directory, which thousands would feel.
        ``listing``: rank 0's, which stays its own. ``asked``: the step or name that this rank was asked for. Blocks
        for all ranks. Raises ``RanksDisagree`` where they were asked for different ones."""
        rows = [] if listing is None else [[getattr(e, name) for name in _SHARED] for e in listing.entries]
        bodies = self.ranks.agree("listing", {"asked": asked, "rows": rows})
        odd = [rank for rank, body in enumerate(bodies) if body["asked"] != bodies[0]["asked"]]
        if odd:
            raise RanksDisagree(
                f"{store.address}: rank 0 restores {bodies[0]['asked']!r}, and rank {odd[0]} "
                f"{bodies[odd[0]]['asked']!r}. Nothing was restored: every rank has to restore the same checkpoint"
            )
        if listing is not None:
            return listing
        found = [dict(zip(_SHARED, row, strict=True)) for row in bodies[0]["rows"]]
        entries = [CheckpointInfo(path=os.path.join(store.address, row["name"]), **row) for row in found]
        return Listing.seen_by("rank 0", store, entries)


class RestoreStages(Stages):
    """Makes all ranks restore one checkpoint together, stage by stage."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self.rank, self.size = coordinator.ranks.rank, coordinator.ranks.size

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        with self._coordinator.together(what):
            yield

    def read(self, reader: Reader, manifest: Manifest, wanted: Extents, consume: Consume) -> list[Damage]:
        ranks = self._coordinator.ranks
        least = self._coordinator.shared_reading_bytes
        if least is None or sum(record.nbytes for record in manifest.files) < least:
            return super().read(reader, manifest, wanted, consume)
        shared = SharedReading(
            self.rank,
            self.size,
            self._coordinator.exchange,
            least_bytes=least,
            timeout_seconds=ranks.options.timeout_seconds,
        )
        return shared.read(reader, manifest, wanted, consume)

    def in_all(self, names: list[str]) -> list[str]:
        others = [set(body) for body in self._coordinator.ranks.agree("unexpected", names)]
        return [name for name in names if all(name in other for other in others)]


def _raise_first(bodies: list[Any], otherwise: type[AsyncCkptError]) -> None:
    """Raise the first rank's error that is among messages of a stage."""
    for rank, body in enumerate(bodies):
        if "error" in body:
            raise error_from_json(body["error"], f"rank {rank}", otherwise)


def _wait_visible(store: Store, owner: str, rank: int) -> None:
    deadline = time.monotonic() + (_VISIBLE_SECONDS if rank else 0.0)
    while True:
        holder = store.holder()
        if holder is not None and holder.owner == owner:
            return
        if time.monotonic() >= deadline:
            raise RunPathError(
                f"rank {rank}: {store.address} is not the directory that rank 0 sees under that name. All ranks have "
                f"to write into one shared file system"
            )
        time.sleep(0.1)
