"""``attach(engine)`` has DeepSpeed save through asyncckpt. See docs/trainers/deepspeed.md."""

from __future__ import annotations

from asyncckpt.errors import MissingExtra

try:
    import deepspeed  # noqa: F401
except ImportError as error:
    if (error.name or "").partition(".")[0] != "deepspeed":
        raise
    raise MissingExtra(
        "asyncckpt.integrations.deepspeed needs deepspeed: pip install 'asyncckpt[deepspeed]'"
    ) from error

from asyncckpt.integrations.deepspeed.engine import AsyncCheckpointEngine, attach
from asyncckpt.integrations.deepspeed.exporting import export

__all__ = ["AsyncCheckpointEngine", "attach", "export"]
