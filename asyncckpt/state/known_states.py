"""A save captures what is known from the save before as it is known, and everything else from the beginning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asyncckpt.events import EventBus, PlanRebuilt
from asyncckpt.state.capture import capture
from asyncckpt.state.kept import KeptCaptures
from asyncckpt.state.known_modules import NotVouched
from asyncckpt.state.known_state import KnownState, Recaptured
from asyncckpt.types import Snapshot

#: A state that changes at every save is made known again only every so many saves.
_MOST_PATIENCE = 16


@dataclass(frozen=True, slots=True)
class Captured:
    """A captured state. ``known``: what is known of it now, None where nothing is. ``again``: how it was captured,
    where it was known before."""

    snapshot: Snapshot
    known: KnownState | None = None
    again: Recaptured | None = None


@dataclass(slots=True)
class _Memory:
    """What is known of one kind of saves. ``patience``: so many saves pass before a state is made known again;
    ``waited``: so many have. ``told``: the components and reasons that were told."""

    known: KnownState | None = None
    patience: int = 0
    waited: int = 0


class KnownStates:
    """Captures the states of one checkpointer's saves. For the training thread."""

    def __init__(self, events: EventBus) -> None:
        self._events = events
        self._kept = KeptCaptures()
        self._memories = {False: _Memory(), True: _Memory()}
        self._told: set[tuple[str, str]] = set()

    def capture(self, state: Mapping[str, Any], step: int, *, weights_only: bool, recognise: bool = True) -> Captured:
        """Capture a state, as ``capture`` does and raising what that raises; what it takes over from earlier captures
        makes no difference to the result. ``recognise``: it is worth while to look at what is known."""
        memory = self._memories[weights_only]
        if recognise and memory.known is not None:
            try:
                again = memory.known.again(state, step)
                memory.patience = 0
                return Captured(again.snapshot, memory.known, again)
            except NotVouched as error:
                memory.known = None
                memory.waited, memory.patience = 0, min(2 * memory.patience + 1, _MOST_PATIENCE)
                self._tell(step, error)
        snapshot = capture(state, step, weights_only=weights_only, kept=self._kept)
        if not recognise:
            return Captured(snapshot)
        memory.waited += 1
        if memory.waited >= memory.patience:
            try:
                memory.known = KnownState(state, snapshot, weights_only=weights_only)
            except NotVouched as error:
                memory.waited, memory.patience = 0, min(2 * memory.patience + 1, _MOST_PATIENCE)
                self._tell(step, error)
        return Captured(snapshot, memory.known)

    def forget(self) -> None:
        """Capture the next state from the beginning."""
        for memory in self._memories.values():
            memory.known = None

    def _tell(self, step: int, error: NotVouched) -> None:
        if (error.component, str(error)) not in self._told:
            self._told.add((error.component, str(error)))
            self._events.emit(PlanRebuilt(step=step, component=error.component, reason=str(error)))
