"""torch for the ground floors, which take live tensors and import no torch: whoever holds one of its objects has it
loaded."""

from __future__ import annotations

import sys
from typing import Any


def loaded_torch() -> Any:
    """The module torch, or None in a process where nobody has imported it. Another thread may be importing it just
    now; then it lacks names."""
    return sys.modules.get("torch")
