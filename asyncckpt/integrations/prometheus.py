"""``Checkpointer(..., on_event=PrometheusSink())`` turns events into Prometheus metrics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from asyncckpt.errors import MissingExtra
from asyncckpt.events import Busy, Committed, Event, Failed, FellBack, Pruned, SaveStarted, Stalled

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

#: A stall lasts a millisecond where all is well, and as long as the whole save where it is not.
_STALL_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_DURABLE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


class PrometheusSink:
    """Registers ``asyncckpt_*`` metrics in ``registry`` (default: prometheus_client's own) and keeps them up to date.

    Set an alert on ``time() - asyncckpt_last_durable_timestamp_seconds`` growing beyond the save interval, and on any
    increase of ``asyncckpt_save_failures_total``. A registry takes one sink; a second raises ``ValueError``. Raises
    ``MissingExtra`` where prometheus_client is not installed. Thread-safe.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        try:
            from prometheus_client import REGISTRY, Counter, Gauge, Histogram
        except ImportError as error:
            raise MissingExtra("PrometheusSink needs prometheus-client: pip install 'asyncckpt[prometheus]'") from error
        into = REGISTRY if registry is None else registry
        self.started = Counter("asyncckpt_saves_started_total", "Saves begun", registry=into)
        self.saves = Counter("asyncckpt_saves_total", "Saves that became durable", registry=into)
        self.failures = Counter("asyncckpt_save_failures_total", "Saves that failed", registry=into)
        self.busy = Counter("asyncckpt_busy_total", "Saves due while the arena was full", ["policy"], registry=into)
        self.fallbacks = Counter("asyncckpt_fallbacks_total", "Checkpoints found unusable on resume", registry=into)
        self.pruned = Counter("asyncckpt_pruned_total", "Checkpoints deleted by retention", registry=into)
        self.nbytes = Counter("asyncckpt_durable_bytes_total", "Bytes made durable", registry=into)
        self.stall = Histogram(
            "asyncckpt_stall_seconds",
            "Time the training thread spent inside asyncckpt, by place",
            ["where"],
            buckets=_STALL_BUCKETS,
            registry=into,
        )
        self.durable = Histogram(
            "asyncckpt_durable_seconds", "From save() to durable", buckets=_DURABLE_BUCKETS, registry=into
        )
        self.last_step = Gauge("asyncckpt_last_durable_step", "Step of the newest durable save", registry=into)
        self.last_time = Gauge(
            "asyncckpt_last_durable_timestamp_seconds", "When the newest save became durable", registry=into
        )
        self.last_bytes = Gauge("asyncckpt_checkpoint_bytes", "Size of the newest durable save", registry=into)

    def __call__(self, event: Event) -> None:
        match event:
            case SaveStarted():
                self.started.inc()
            case Stalled():
                self.stall.labels(where=event.where).observe(event.seconds)
            case Committed():
                self.saves.inc()
                self.nbytes.inc(event.nbytes)
                self.durable.observe(event.durable_seconds)
                self.last_step.set(event.step)
                self.last_time.set(time.time())
                self.last_bytes.set(event.nbytes)
            case Failed():
                self.failures.inc()
            case Busy():
                self.busy.labels(policy=event.policy).inc()
            case FellBack():
                self.fallbacks.inc()
            case Pruned(deleted=True):
                self.pruned.inc()
            case _:
                pass
