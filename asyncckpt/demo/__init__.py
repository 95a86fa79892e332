"""The demo trains a small GPT, kills it while it saves, resumes, compares bit for bit, measures, and draws.

``run`` checks that the extra ``demo`` (rich, matplotlib) is installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from asyncckpt.errors import InvalidOption, MissingExtra

#: A run makes this many saves, the last step's among them; the demo kills the process in the middle one.
_SAVES = 6
DEFAULT_STEPS = 60


def run(out: Path, *, steps: int = DEFAULT_STEPS, rounds: int = 5) -> int:
    """Run the demo in directory ``out``, made if need be; return 0 where everything is bit-equal, 1 otherwise.

    It takes one to three minutes and 1 GB of disk with the default ``steps``. What an earlier demo left in ``out`` is
    removed first; a directory that holds anything else is refused with ``RunPathError``. Each way of saving is measured
    ``rounds`` times. Raises ``MissingExtra`` naming what to install.
    """
    if type(steps) is not int or steps < _SAVES:
        raise InvalidOption(f"steps must be a whole number >= {_SAVES}, not {steps!r}")
    if type(rounds) is not int or rounds < 1:
        raise InvalidOption(f"rounds must be a whole number >= 1, not {rounds!r}")
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(f"the demo needs {' and '.join(missing)}: pip install 'asyncckpt[demo]'")
    from asyncckpt.demo.story import tell  # imported only now, because it imports both

    return tell(Path(out), steps=steps, every=max(1, steps // _SAVES), rounds=rounds)
