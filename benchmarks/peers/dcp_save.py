"""``torch.distributed.checkpoint.save`` fsyncs its files; the durable time adds the directories."""

from __future__ import annotations

from torch.distributed.checkpoint.state_dict_saver import save

from benchmarks.harness.state import State
from benchmarks.peers import Saved, Session, blocking
from benchmarks.peers._dcp import DcpSession

LABEL = "DCP save"


class DcpSave(DcpSession):
    def save(self, step: int) -> Saved:
        def write() -> None:
            save(self.state_dict(), storage_writer=self.writer(step))

        return blocking(write, self.path(step))


def setup(state: State, directory: str) -> Session:
    return DcpSave(state, directory)
