"""torch_checkpointing's manager stages asynchronously into shared memory, from which its process writes.

It does not fsync: the durable time includes an fsync of every file and directory. Its direct I/O is off, because ext4
answers its unaligned writes with EINVAL. The staging memory is allocated ahead by its own ``prewarm_staging``.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

from torch_checkpointing.checkpoint_manager import CheckpointManager
from torch_checkpointing.checkpoint_writer import CheckpointWriterConfig
from torch_checkpointing.config import AsyncCheckpointSaverConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from benchmarks.harness.state import State
from benchmarks.peers import Saved, Session, in_background

LABEL = "torch_checkpointing"


class TorchCheckpointing(Session):
    def __init__(self, state: State, directory: str) -> None:
        super().__init__(state, directory)
        self._manager: Any = CheckpointManager(
            CheckpointManager.Config(
                save=AsyncCheckpointSaverConfig(writer_config=CheckpointWriterConfig(file_write_max_threads=2)),
                storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
            )
        )
        self._manager.prewarm_staging(self._payload())

    def save(self, step: int) -> Saved:
        began = time.perf_counter()
        return in_background(began, self._manager.save(self.path(step), self._payload()), self.path(step))

    def restore(self, step: int) -> None:
        payload = self._payload()
        loaded = self._manager.load(self.path(step), into=payload)
        for name, value in self.state.items():
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(loaded[name])

    def guard(self) -> AbstractContextManager[object]:
        lock: AbstractContextManager[object] = self._manager.lock()
        return lock

    def close(self) -> None:
        self._manager.close()

    def _payload(self) -> dict[str, Any]:
        return {n: v.state_dict() if hasattr(v, "state_dict") else v for n, v in self.state.items()}


def setup(state: State, directory: str) -> Session:
    return TorchCheckpointing(state, directory)
