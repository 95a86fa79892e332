"""Rank 0 announces saves to the other ranks some steps ahead, so that all save after the same step."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from asyncckpt.errors import RankLost
from asyncckpt.ranks.store import RankStore

log = logging.getLogger("asyncckpt")

#: Rank 0 announces a save for this many steps later. Ranks that train together are at most a step apart; what the host
#: enqueues ahead of a GPU is less than another one.
LEAD_STEPS: Final = 2
#: The longest that a step waits for the job's store.
LOOK_SECONDS: Final = 1.0
#: For how long a store that did not answer is asked nothing more.
_SILENCE_SECONDS: Final = 30.0


class Announcements:
    """Lets all ranks act at the same step. For the training thread.

    Each look at the job's store costs one short message, and ends after ``LOOK_SECONDS``: a store that has stopped is
    taken to announce nothing, and is left alone for half a minute. A rank that missed an announcement that way saves
    at another step than the others, and that save fails with ``RanksDisagree``."""

    def __init__(self, ranks: RankStore) -> None:
        self._leads = ranks.rank == 0
        self._patient = ranks
        self._ranks = self._quick()
        self._silent_until_seconds = 0.0
        self._announced: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._raised: set[str] = set()

    def _quick(self) -> RankStore:
        return self._patient.with_options(replace(self._patient.options, timeout_seconds=LOOK_SECONDS))

    def decide_at_step(self, what: str, step: int, here: bool) -> bool:
        """Whether to do ``what`` after this step. Every rank gets True at the same step, ``LEAD_STEPS`` after rank 0
        first called with ``here``; other ranks' ``here`` counts for nothing. Blocks for ``LOOK_SECONDS`` at most a
        message."""
        number = self._numbers.setdefault(what, 0)
        key = f"announced/{what}/{number}"
        if what not in self._announced:
            with self._asking() as store:
                if store is not None and self._leads and here:
                    store.post(key, step + LEAD_STEPS)
                    self._announced[what] = step + LEAD_STEPS
                elif store is not None and not self._leads and store.exists(key):
                    self._announced[what] = int(store.read(key, LOOK_SECONDS, "rank 0"))
        if step < self._announced.get(what, step + 1):
            return False
        del self._announced[what]
        self._numbers[what] = number + 1
        return True

    def raise_flag(self, what: str, here: bool) -> bool:
        """Tell rank 0, once, that ``what`` holds on this rank (``here``). Returns, on rank 0, whether it holds on any
        rank it has heard of; on the others False. Blocks for ``LOOK_SECONDS`` at most."""
        key = f"raised/{what}"
        if here and not self._leads and what not in self._raised:
            with self._asking() as store:
                if store is not None:
                    store.post(key, True)
                    self._raised.add(what)
        if self._leads and not here:
            with self._asking() as store:
                here = store is not None and store.exists(key)
        return self._leads and here

    @contextlib.contextmanager
    def _asking(self) -> Iterator[RankStore | None]:
        """Yield the job's store, or None while it is left alone. Where it does not answer, the body ends there, and
        nothing is raised."""
        if time.monotonic() < self._silent_until_seconds:
            yield None
            return
        try:
            yield self._ranks
        except RankLost as error:
            self._silent_until_seconds = time.monotonic() + _SILENCE_SECONDS
            self._ranks = self._quick()  # the connection that does not answer is given up
            log.warning("no step waits for the ranks of this job for %.0f s: %s", _SILENCE_SECONDS, error)
