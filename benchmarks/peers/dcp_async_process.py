"""``torch.distributed.checkpoint.async_save`` writes from a spawned process, through shared memory. It fsyncs its
files; the durable time adds the directories. The first save starts the process, as DCP leaves no other way."""

from __future__ import annotations

from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.harness.state import State
from benchmarks.peers import Session
from benchmarks.peers._dcp_async import DcpAsync

LABEL = "DCP async_save, process"


def setup(state: State, directory: str) -> Session:
    return DcpAsync(state, directory, AsyncCheckpointerType.PROCESS)
