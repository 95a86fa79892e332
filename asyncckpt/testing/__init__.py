"""Tests of code that saves checkpoints use these doubles: devices that are slow or stuck, or that fail one call of your
choice; one that records every call; and a model of what a power loss can leave of the calls.

Put one into a store: ``checkpointer._store.ops = GatedOps()``, or make ``LocalStore(path, ops=…)``.
"""

from asyncckpt.testing.crashes import CrashModel
from asyncckpt.testing.devices import FaultyOps, GatedOps, SlowOps, ThrottledOps
from asyncckpt.testing.interception import READING, Fault, InterceptedOps, KillingOps, Site, SiteFaultOps
from asyncckpt.testing.memory import MemoryOps
from asyncckpt.testing.recording import RecordingOps, Trace, permitted
from asyncckpt.testing.recovery import Outcome, Recovery, check_trace

__all__ = [
    "READING",
    "CrashModel",
    "Fault",
    "FaultyOps",
    "GatedOps",
    "InterceptedOps",
    "KillingOps",
    "MemoryOps",
    "Outcome",
    "RecordingOps",
    "Recovery",
    "Site",
    "SiteFaultOps",
    "SlowOps",
    "ThrottledOps",
    "Trace",
    "check_trace",
    "permitted",
]
