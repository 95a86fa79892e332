"""Dashboards are told a few named numbers of each event."""

from __future__ import annotations

from asyncckpt.events import Busy, Committed, Event, Failed, FellBack, Stalled


def scalars(event: Event) -> dict[str, float]:
    """Return the numbers of an event by name, in seconds and bytes. Events that a dashboard does not need have none."""
    match event:
        case Committed():
            return {
                "asyncckpt/stall_seconds": event.stall_seconds,
                "asyncckpt/durable_seconds": event.durable_seconds,
                "asyncckpt/commit_seconds": event.commit_seconds,
                "asyncckpt/bytes": float(event.nbytes),
                "asyncckpt/bytes_per_second": event.nbytes / event.durable_seconds
                if event.durable_seconds > 0
                else 0.0,
                "asyncckpt/last_durable_step": float(event.step),
            }
        case Stalled():
            return {f"asyncckpt/stall_in_{event.where.replace('.', '_')}_seconds": event.seconds}
        case Failed():
            return {"asyncckpt/failed": 1.0}
        case Busy():
            return {"asyncckpt/busy": float(event.in_flight)}
        case FellBack():
            return {"asyncckpt/fell_back": 1.0}
        case _:
            return {}
