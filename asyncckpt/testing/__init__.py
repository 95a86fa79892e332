"""Doubles for tests of code that saves checkpoints: devices that are slow, stuck, or fail one call of your choice; one
that records every call; and a model of what a power loss can leave of them.

Put one into a store: ``checkpointer._store.ops = GatedOps()``, or make ``LocalStore(path, ops=…)``.
"""

from asyncckpt.testing.devices import FaultyOps, GatedOps, SlowOps, ThrottledOps

__all__ = ["FaultyOps", "GatedOps", "SlowOps", "ThrottledOps"]
