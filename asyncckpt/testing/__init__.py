"""Doubles for tests of code that saves checkpoints: devices that are slow, stuck, or fail one call of your choice; one
that records every call; and a model of what a power loss can leave of them.

Put one into a store: ``checkpointer._store.ops = GatedOps()``, or make ``LocalStore(path, ops=…)``.
"""

from asyncckpt.testing.crashes import CrashModel
from asyncckpt.testing.devices import FaultyOps, GatedOps, SlowOps, ThrottledOps
from asyncckpt.testing.memory import MemoryOps
from asyncckpt.testing.recording import RecordingOps, Trace, permitted
from asyncckpt.testing.recovery import Outcome, Recovery, check_trace

__all__ = [
    "CrashModel",
    "FaultyOps",
    "GatedOps",
    "MemoryOps",
    "Outcome",
    "RecordingOps",
    "Recovery",
    "SlowOps",
    "ThrottledOps",
    "Trace",
    "check_trace",
    "permitted",
]
