"""``asyncckpt doctor`` examines a path."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from asyncckpt.cli.common import Exit, JsonOption, clean, console, exits, print_json

if TYPE_CHECKING:
    from asyncckpt.doctor import Finding, Report

_STYLES = {"good": "green", "note": "cyan", "warning": "yellow", "unsafe": "red"}
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def doctor(
    path: Annotated[str, typer.Argument(metavar="PATH", help="where a run is, or is to be", show_default=False)],
    seconds: Annotated[float, typer.Option(metavar="S", help="about how long to measure speed; 0: not at all")] = 8.0,
    max_bytes: Annotated[int, typer.Option(metavar="N", help="the most to have on the disk at one time")] = 256 << 20,
    json: JsonOption = False,
) -> None:
    """Check whether a file system is safe and fast for checkpoints.

    The command tries in PATH what saves rely on, measures the speed there, and recommends settings. Whatever it writes
    it deletes again, after Ctrl-C too. It exits with 1 where checkpoints would be unsafe."""
    from asyncckpt.doctor import examine

    with exits(), _first_signal_leaves():
        report = examine(path, seconds=seconds, max_bytes=max_bytes, on_finding=None if json else _show)
    if json:
        print_json(_as_json(report))
    else:
        _show_verdict(report)
    if report.unsafe:
        raise typer.Exit(int(Exit.DAMAGED_OR_DIFFERENT))


@contextlib.contextmanager
def _first_signal_leaves() -> Iterator[None]:
    """Let the first signal unwind the stack, which deletes what was written. More signals, from an impatient user, do
    not stop that."""

    def leave(number: int, frame: FrameType | None) -> None:
        for one in _SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before: dict[signal.Signals, Any] = {}
    try:
        for one in _SIGNALS:
            if signal.getsignal(one) is not signal.SIG_IGN:  # nohup ignores a signal
                before[one] = signal.signal(one, leave)
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _show(finding: Finding) -> None:
    row = Table.grid(padding=(0, 2))
    row.add_column(width=max(map(len, _STYLES)))
    row.add_column(width=25)
    row.add_column()
    text = Text(clean(finding.seen))
    if finding.advice:
        text.append(f": {clean(finding.advice)}")
    row.add_row(Text(finding.status, _STYLES[finding.status]), Text(clean(finding.check)), text)
    console.print(row)


def _show_verdict(report: Report) -> None:
    counts = {status: sum(one.status == status for one in report.findings) for status in ("unsafe", "warning")}
    if report.unsafe:
        verdict = Text("unsafe", "red").append(f": do not save checkpoints in {clean(report.path)}", "default")
    elif counts["warning"]:
        plural = "s" if counts["warning"] > 1 else ""
        verdict = Text("usable", "yellow").append(f", with {counts['warning']} warning{plural}", "default")
    else:
        verdict = Text("good", "green")
    console.print()
    console.print(verdict)
    if code := report.code():
        console.print()
        console.print(code, soft_wrap=True)


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "path": report.path,
        "examined": report.examined,
        "unsafe": report.unsafe,
        "findings": [dataclasses.asdict(one) for one in report.findings],
        "speeds": dataclasses.asdict(report.speeds),
        "recommended": [dataclasses.asdict(one) for one in report.settings],
        "code": report.code(),
    }
