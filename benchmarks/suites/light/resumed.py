"""``python -m benchmarks.suites.light.resumed DIRECTORY TENSORS ITEMS BEGAN`` resumes a run and makes one step.

It prints as JSON how the seconds since BEGAN (by ``time.time``) went by.
"""

import time

_STARTED_UNIX_SECONDS = time.time()

import json  # noqa: E402  the imports are what is measured
import sys  # noqa: E402

from asyncckpt import Checkpointer  # noqa: E402
from benchmarks.suites.light.state import adamw_state  # noqa: E402


def main(directory: str, tensors: int, items: int, began_unix_seconds: float) -> None:
    """Make a state, resume it, and make one step; print the parts."""
    imported = time.time()
    state = adamw_state(tensors, items)
    made = time.time()
    with Checkpointer(directory) as checkpointer:
        step = checkpointer.resume(state)
        resumed = time.time()
        state["optimizer"].step()
        stepped = time.time()
    parts = {
        "start_seconds": _STARTED_UNIX_SECONDS - began_unix_seconds,
        "import_seconds": imported - _STARTED_UNIX_SECONDS,
        "model_seconds": made - imported,
        "resume_seconds": resumed - made,
        "step_seconds": stepped - resumed,
        "whole_seconds": stepped - began_unix_seconds,
    }
    print(json.dumps({**parts, "step": step}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
