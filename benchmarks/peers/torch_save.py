"""``torch.save`` writes the state dicts into one file. It does not fsync: the durable time includes an fsync of the
file, its directory and the parent."""

from __future__ import annotations

import os

import torch

from benchmarks.harness.state import State
from benchmarks.peers import Saved, Session, blocking

LABEL = "torch.save + fsync"


class TorchSave(Session):
    def save(self, step: int) -> Saved:
        def write() -> None:
            os.mkdir(self.path(step))
            # given a path, torch writes from C++; given a Python file, it would be slower
            torch.save(_state_dicts(self.state), os.path.join(self.path(step), "state.pt"))

        return blocking(write, self.path(step))

    def restore(self, step: int) -> None:
        loaded = torch.load(os.path.join(self.path(step), "state.pt"), weights_only=True)
        for name, value in self.state.items():
            value.load_state_dict(loaded[name])


def _state_dicts(state: State) -> State:
    return {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in state.items()}


def setup(state: State, directory: str) -> Session:
    return TorchSave(state, directory)
