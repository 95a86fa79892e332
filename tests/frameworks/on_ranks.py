"""Runs a training of this folder on two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def on_ranks(script: str, folder: Path, *more: str) -> Any:
    """Run a script with two ranks, and return what it has written into ``found.json`` of the folder that it is
    given, beside ``more``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(Path(__file__).parent / script), str(folder), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())
