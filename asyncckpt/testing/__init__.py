"""Tests of code that saves checkpoints use these doubles: devices that are slow or stuck, or that fail one call of your
choice; one that records every call; and a model of what a power loss can leave of the calls.

Hand one over with a store: ``Checkpointer(path, run=RunOptions(store=LocalStore(path, ops=GatedOps())))``. Code that
needs no file system at all saves to ``memory://name``.
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
