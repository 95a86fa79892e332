"""Crews of rank processes that live from test to test, and the table of who saved what."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.harness import Crews
from support.report_table import TABLE


@pytest.fixture(scope="session")
def crews() -> Iterator[Crews]:
    """``crews(4)``: four idle ranks of one job."""
    kept = Crews()
    yield kept
    kept.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = TABLE.lines()
    if lines:
        terminalreporter.section("data files of many ranks against those of one process")
        for line in lines:
            terminalreporter.write_line(line)
