"""``asyncckpt follow``: what it shows of a live run, and that it looks again until it is stopped."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.branches import saved, state
from typer.testing import CliRunner

from asyncckpt import Checkpointer, RunOptions
from asyncckpt.cli.app import app
from asyncckpt.cli.follow import sparkline


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["follow", *map(str, arguments)])


def test_once_shows_the_newest_checkpoints_and_what_happened(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Checkpointer(path) as run:
        for step in range(1, 13):
            run.save(step, state(step), metrics={"loss": 1 / step}).result()
        text = call(path, "--once").stdout
        assert f"held by host {os.uname().nodename}, pid {os.getpid()}" in text
    text = call(path, "--once").stdout
    assert "nobody writes it" in text
    assert "12 checkpoints" in text
    assert "loss=0.0833333" in text
    assert "step-00000004 " not in text  # only the newest eight
    assert text.count("durable in") == 8
    assert "stall" in text
    assert "█" in text
    (path / "step-00000012" / "state.json").unlink()
    assert "1 damaged" in call(path, "--once").stdout


def test_a_run_without_journal_and_without_checkpoints_is_shown(tmp_path: Path) -> None:
    saved(tmp_path / "run", 1, run=RunOptions(journal=False))
    assert "step-00000001" in call(tmp_path / "run", "--once").stdout
    (tmp_path / "empty").mkdir()
    assert "0 checkpoints" in call(tmp_path / "empty", "--once").stdout
    assert call(tmp_path / "none", "--once").exit_code == 3
    assert call(tmp_path / "run", "--every", "0").exit_code == 2


@pytest.mark.parametrize(
    ("values", "line"),
    [([], ""), ([0, 0], "  "), ([1, 8], "▁█"), ([4, 8, 0], "▄█ "), ([float("nan"), float("inf"), -1, 2], "   █")],
)
def test_bars_reach_from_nothing_to_the_largest(values: list[float], line: str) -> None:
    assert sparkline(values) == line


def test_it_looks_again_until_it_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "run"
    saved(path, 1)
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "150", "LINES": "50", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", "from asyncckpt.cli import main; main()", "follow", str(path), "--every", "0.1"],
        stdout=follower,
        stdin=follower,
        env=environment,
    )
    os.close(follower)

    def wait_for(text: bytes) -> None:
        seen, deadline = b"", time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([leader], [], [], 0.1)[0]:
                seen += os.read(leader, 1 << 16)

    try:
        wait_for(b"step-00000001")
        saved(path, 2)
        wait_for(b"step-00000002")
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([leader], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):  # it has ended
                    os.read(leader, 1 << 16)
        assert process.poll() == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)
