"""The peers of ``torch.distributed.checkpoint`` share this session."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from benchmarks.harness.state import State
from benchmarks.peers import Session

#: More than one thread splits a rank's data over that many files; two suit the two cores that this was measured on.
WRITER_THREADS = 2


class DcpSession(Session):
    """Takes the job's process group, or makes one of one rank, as ``async_save`` demands one."""

    def __init__(self, state: State, directory: str) -> None:
        super().__init__(state, directory)
        warnings.filterwarnings("ignore", module="torch.distributed")
        self._alone = not dist.is_initialized()
        if self._alone:
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)

    def state_dict(self) -> dict[str, Any]:
        """Gather the state as DCP's own documentation does. A tied weight goes in once, in the peer's favour: DCP would
        write it under each of its names."""
        if "model" not in self.state:
            return dict(self.state)
        model, optimizer = get_state_dict(self.state["model"], self.state["optimizer"])
        seen: set[int] = set()
        weights: dict[str, Any] = {}
        for name, tensor in model.items():
            if isinstance(tensor, torch.Tensor):
                memory = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                if memory.numel() and memory.data_ptr() in seen:
                    continue
                seen.add(memory.data_ptr())
            weights[name] = tensor
        return {"model": weights, "optimizer": optimizer}

    def writer(self, step: int) -> FileSystemWriter:
        """Make the writer. Its ``sync_files`` fsyncs the files but no directory; that is added to the durable time."""
        return FileSystemWriter(self.path(step), thread_count=WRITER_THREADS, sync_files=True)

    def restore(self, step: int) -> None:
        state_dict = self.state_dict()
        load(state_dict, checkpoint_id=self.path(step))
        model: nn.Module = self.state["model"]
        names = {id(p): name for name, p in model.named_parameters(remove_duplicate=True)}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            state_dict["model"].setdefault(name, state_dict["model"].get(names[id(parameter)]))
        set_state_dict(
            model,
            self.state["optimizer"],
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )

    def close(self) -> None:
        if self._alone:
            dist.destroy_process_group()
