"""``torch.distributed.checkpoint.async_save`` writes from a thread. It fsyncs its files; the durable time adds the
directories."""

from __future__ import annotations

from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.harness.state import State
from benchmarks.peers import Session
from benchmarks.peers._dcp_async import DcpAsync

LABEL = "DCP async_save, thread"


def setup(state: State, directory: str) -> Session:
    return DcpAsync(state, directory, AsyncCheckpointerType.THREAD)
