"""Which tests share a process of ``make test``, and in which order they begin.

A process runs whole files, as ``--dist loadfile`` has it. All files of ranks are one process's, one after the other:
their crews are started once, and ranks that wait for each other do not wait for those of other crews, too. Files that
run scripts share the server that theirs are forked from. The longest begin first, so that none is alone at the end.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import pytest

#: Beside those of ranks: files whose processes are forked from the ranks' server.
_FORKED = {"test_docs.py", "test_examples.py", "test_demo.py", "test_hooks.py", "test_cli_live.py", "test_golden.py"}
#: Folders with files that take long.
_LONG = {"faults", "write", "tests"}


def together(file: str) -> str:
    """The name of what shares a process with this file."""
    path = PurePath(file)
    if path.parent.name == "ranks":
        return "ranks"
    return "forked" if path.name in _FORKED else file


def begins(file: str) -> int:
    """Lower numbers begin earlier."""
    folder = PurePath(file).parent.name
    return {"ranks": 0, "forked": 1}.get(together(file), 2 if folder in _LONG else 3)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return together(super()._split_scope(nodeid))

    config.option.loadscopereorder = False  # by the number of tests, which says little about the time
    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: begins(item.nodeid.split("::")[0]))
