"""``convert`` reads what plain ``torch.distributed.checkpoint`` wrote, without executing a pickle."""

from __future__ import annotations

from asyncckpt.convert.dcp.conversion import Converted, convert

__all__ = ["Converted", "convert"]
