"""Checkpoints that plain ``torch.distributed.checkpoint`` wrote, read without executing a pickle."""

from __future__ import annotations

from asyncckpt.convert.dcp.conversion import Converted, convert

__all__ = ["Converted", "convert"]
