"""asyncckpt is measured with ``watch(optimizer)``: ``save`` returns at once, and a step pre-hook waits for what is
left."""

from __future__ import annotations

from benchmarks.harness.state import State
from benchmarks.peers import Session
from benchmarks.peers.asyncckpt import Asyncckpt

LABEL = "asyncckpt, deferred"


def setup(state: State, directory: str) -> Session:
    return Asyncckpt(state, directory, watch=True, staging_bytes=None)
