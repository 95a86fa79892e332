"""Has Accelerate use FSDP on ranks without GPUs. By itself it drops the plugin that it is given there, without a word,
and wraps models in DDP; all that follows runs with gloo as it does with GPUs."""

from __future__ import annotations

from typing import Any

import accelerate.state
from accelerate.utils import DistributedType


def use_fsdp_on_cpu() -> None:
    """Change the state that all of this process's accelerators share as it is made."""
    original = accelerate.state.AcceleratorState.__init__

    def made(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        plugin = options.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = self.distributed_type

    accelerate.state.AcceleratorState.__init__ = made


def local(state: dict[str, Any]) -> dict[str, Any]:
    """Return what this rank has of each tensor."""
    return {name: value.to_local() if hasattr(value, "to_local") else value for name, value in state.items()}
