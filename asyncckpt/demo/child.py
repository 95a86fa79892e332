"""The demo runs its processes here, listens to what they report, and kills one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncckpt.errors import AsyncCkptError

Report = dict[str, Any]


class ChildFailed(AsyncCkptError, RuntimeError):
    """A process of the demo ended by itself with an error."""


def follow(
    module: str,
    arguments: list[str | Path],
    log: Path,
    on_report: Callable[[Report], None],
    kill_when: Callable[[Report], bool] | None = None,
) -> tuple[list[Report], int]:
    """Run ``python -m module`` to its end; return what it reported, and its exit code (-9 where it was killed).

    It is killed with SIGKILL at the first report that ``kill_when`` picks. ``log`` receives its standard error. Raises
    ``ChildFailed``, with the end of that log, where it fails by itself.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    reports: list[Report] = []
    killed = False
    with (
        log.open("ab") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                report: Report = json.loads(line)
                if kill_when is not None and not killed and kill_when(report):
                    process.kill()  # killed before anything else happens, as the save goes on meanwhile
                    killed = True
                reports.append(report)
                on_report(report)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0 and not killed:
        tail = log.read_text(errors="replace").strip().splitlines()[-8:]
        raise ChildFailed(f"{module} ended with code {process.returncode}; see {log}\n" + "\n".join(tail))
    return reports, process.returncode
