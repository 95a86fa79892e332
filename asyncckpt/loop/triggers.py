"""Cadence and preemption decide whether a step ends in a save, alone or together with the ranks of a job."""

from __future__ import annotations

import time

from asyncckpt.loop import cadence
from asyncckpt.loop.preemption import Preemption, SignalWatch
from asyncckpt.ranks.coordinator import Coordinator


class SaveTriggers:
    """Decides which steps end in a save. For the training thread. Answers that look at a clock, and signals, are
    settled with the other ranks: see ``Announcements``."""

    def __init__(self, every: cadence.Every, preempt: Preemption | None) -> None:
        self._by_step, self._by_clock = cadence.by_step_and_by_clock(cadence.parse(every))
        self.signals = SignalWatch(preempt) if preempt is not None else None
        self._last_saved_seconds = time.monotonic()

    def saved(self) -> None:
        """Note that a save has begun."""
        self._last_saved_seconds = time.monotonic()

    def due(self, step: int, last: int | None, coordinator: Coordinator | None) -> bool:
        """Whether to save after ``step``; ``last`` is the newest step saved or resumed from."""
        now = time.monotonic()
        by_clock = self._by_clock.due(step, now, last, self._last_saved_seconds)
        if coordinator is not None and not isinstance(self._by_clock, cadence.Never):
            by_clock = coordinator.announcements.decide_at_step("due", step, by_clock)
        return by_clock or self._by_step.due(step, now, last, self._last_saved_seconds)

    def preempted(self, step: int, coordinator: Coordinator | None) -> SignalWatch | None:
        """Return the signals where one of them asks to save and leave after ``step``, None otherwise."""
        signals = self.signals
        if signals is None:
            return None
        here = signals.received is not None
        if coordinator is not None:
            announcements = coordinator.announcements
            here = announcements.decide_at_step("leave", step, announcements.raise_flag("leave", here))
            if here:
                signals.mark_received()
        return signals if here else None

    def close(self) -> None:
        """Put the previous signal handlers back."""
        if self.signals is not None:
            self.signals.close()
