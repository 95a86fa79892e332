"""Cadence and preemption decide whether a step ends in a save, alone or together with the ranks of a job."""

from __future__ import annotations

import logging
import time

from asyncckpt import interrupts
from asyncckpt.loop import cadence
from asyncckpt.loop.preemption import Preemption, SignalWatch
from asyncckpt.ranks.coordinator import Coordinator

log = logging.getLogger("asyncckpt")


class SaveTriggers:
    """Decides which steps end in a save. For the training thread. Answers that look at a clock, and signals, are
    settled with the other ranks: see ``Announcements``."""

    def __init__(self, every: cadence.Every, preempt: Preemption | None) -> None:
        parsed = cadence.parse(every)
        self._decides = not isinstance(parsed, cadence.Never)
        self._by_step, self._by_clock = cadence.by_step_and_by_clock(parsed)
        self.signals = SignalWatch(preempt) if preempt is not None else None
        self._last_saved_seconds = time.monotonic()
        #: The newest step that was asked about, or None.
        self._last_step: int | None = None

    def saved(self) -> None:
        """Note that a save has begun."""
        self._last_saved_seconds = time.monotonic()

    def due(self, step: int, last: int | None, coordinator: Coordinator | None) -> bool:
        """Whether to save after ``step``; ``last`` is the newest step saved or resumed from."""
        self._last_step = step
        now = time.monotonic()
        by_clock = self._by_clock.due(step, now, last, self._last_saved_seconds)
        if coordinator is not None and not isinstance(self._by_clock, cadence.Never):
            with interrupts.deferred():
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
            with interrupts.deferred():
                here = announcements.decide_at_step("leave", step, announcements.raise_flag("leave", here))
            if here:
                signals.mark_received()
        return signals if here else None

    def tell_of_unsaved(self, path: str, last: int | None) -> None:
        """Log which last steps no checkpoint has, where a cadence decides; ``last`` is the newest step saved. Says so
        once."""
        step, self._last_step = self._last_step, None
        if step is None or not self._decides or (last is not None and last >= step):
            return
        kept = f"the newest checkpoint is that of step {last}" if last is not None else "nothing was saved"
        log.warning(
            "%s: step %d, the last one, is not saved: %s. Where it is to be kept, call save(%d, state) before close()",
            path,
            step,
            kept,
            step,
        )

    def forget_last_step(self) -> None:
        """Say nothing of steps that are not saved: the loop has not come to its end."""
        self._last_step = None

    def close(self) -> None:
        """Put the previous signal handlers back."""
        if self.signals is not None:
            self.signals.close()
