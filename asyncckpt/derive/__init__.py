"""Checkpoints are made of checkpoints here: averages, thinned ones, copies. Nothing in the library imports these
modules."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncckpt.derive.averaging import Averaged, average
    from asyncckpt.derive.copying import Copied, copy
    from asyncckpt.derive.thinning import ThinningReport, thin

__all__ = ["Averaged", "Copied", "ThinningReport", "average", "copy", "thin"]

_HOMES = {
    "Averaged": "asyncckpt.derive.averaging",
    "average": "asyncckpt.derive.averaging",
    "Copied": "asyncckpt.derive.copying",
    "copy": "asyncckpt.derive.copying",
    "ThinningReport": "asyncckpt.derive.thinning",
    "thin": "asyncckpt.derive.thinning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
