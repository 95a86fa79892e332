"""The lower packages take live tensors and still do not import torch: whoever holds a tensor has loaded torch already,
and this module finds it."""

from __future__ import annotations

import sys
from typing import Any


def loaded_torch() -> Any:
    """Return the module ``torch``, or None in a process where nobody has imported it. While another thread imports it,
    the module is there and lacks names."""
    return sys.modules.get("torch")
