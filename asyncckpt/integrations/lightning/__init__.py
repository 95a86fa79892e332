"""``Trainer(plugins=[AsyncckptIO()])`` has Lightning save through asyncckpt. See docs/trainers/lightning.md."""

from __future__ import annotations

from asyncckpt.errors import MissingExtra

try:
    from asyncckpt.integrations.lightning.callback import AsyncckptCallback
    from asyncckpt.integrations.lightning.exporting import export, load_from_checkpoint
    from asyncckpt.integrations.lightning.plugin import AsyncckptIO
    from asyncckpt.integrations.lightning.rng import RandomState
    from asyncckpt.integrations.lightning.strategy import (
        AsyncckptDDPStrategy,
        AsyncckptFSDPStrategy,
        AsyncckptModelParallelStrategy,
    )
except ImportError as error:
    if (error.name or "").partition(".")[0] != "lightning":
        raise
    raise MissingExtra(
        "asyncckpt.integrations.lightning needs lightning: pip install 'asyncckpt[lightning]'"
    ) from error

__all__ = [
    "AsyncckptCallback",
    "AsyncckptDDPStrategy",
    "AsyncckptFSDPStrategy",
    "AsyncckptIO",
    "AsyncckptModelParallelStrategy",
    "RandomState",
    "export",
    "load_from_checkpoint",
]
