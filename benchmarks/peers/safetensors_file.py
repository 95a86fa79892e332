"""``safetensors.torch.save_file`` writes one file a component. It does not fsync: the durable time includes an fsync of
the files, their directory and the parent. Only tensors are written, tied ones once; param groups and the like are not,
in the peer's favour."""

from __future__ import annotations

import os

from safetensors.torch import load_file, save_file

from benchmarks.harness.state import State, flat_tensors
from benchmarks.peers import Saved, Session, blocking

LABEL = "safetensors + fsync"


class SafetensorsFile(Session):
    def save(self, step: int) -> Saved:
        def write() -> None:
            os.mkdir(self.path(step))
            for component, tensors in flat_tensors(self.state).items():
                save_file(tensors, self._file(step, component))

        return blocking(write, self.path(step))

    def restore(self, step: int) -> None:
        for component, tensors in flat_tensors(self.state).items():
            loaded = load_file(self._file(step, component))
            for name, tensor in tensors.items():
                tensor.detach().copy_(loaded[name])

    def _file(self, step: int, component: str) -> str:
        return os.path.join(self.path(step), f"{component}.safetensors")


def setup(state: State, directory: str) -> Session:
    return SafetensorsFile(state, directory)
