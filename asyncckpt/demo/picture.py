"""``timeline.png`` shows the killed run and its resumption on one time axis, and one save from close by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from asyncckpt.demo.child import Report

_COLOURS = {
    "forward": "#9ecae1",
    "backward": "#4a90c4",
    "update": "#1f4e79",
    "stall": "#d62728",
    "staging": "#ff9f1c",
    "writing": "#2ca02c",
    "commit": "#7b3fa0",
    "restore": "#17a2a2",
}
_MEANING = {
    "forward": "forward",
    "backward": "backward",
    "update": "optimizer update",
    "stall": "stall: training waits for asyncckpt",
    "staging": "staging: copy to memory",
    "writing": "writing: hash, write",
    "commit": "commit: fsync, manifest, rename",
    "restore": "restore, verifying",
}
_LANES = ("training", "stall", "staging", "writing", "commit")
Bar = tuple[str, str, float, float]  # a lane, a colour's name, the begin and the end


def draw(killed: Sequence[Report], resumed: Sequence[Report], killed_step: int, path: Path) -> None:
    """Draw the reports of both processes into ``path``. Their clocks agree, as ``perf_counter`` counts from boot."""
    zero = next(r["at_seconds"] for r in killed if r["kind"] == "Began")
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(14, 8.4), dpi=130, layout="constrained")
        story, close = figure.subplots(2, 1, height_ratios=[1, 1.15])
        _story(story, killed, resumed, killed_step, zero)
        _close(close, resumed)
        handles = [Patch(color=_COLOURS[name], label=meaning) for name, meaning in _MEANING.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path)


def _story(axes: Axes, killed: Sequence[Report], resumed: Sequence[Report], killed_step: int, zero: float) -> None:
    _bars(axes, [*_timed(killed), *_timed(resumed)], zero)
    start = next(r["start"] for r in resumed if r["kind"] == "Ready")
    death = max(map(_at, killed)) - zero
    back = next(r["at_seconds"] - r["seconds"] for r in resumed if r["kind"] == "Restored") - zero
    axes.axvspan(death, back, color="#eeeeee", zorder=0)
    axes.axvline(death, color="black", lw=1.8, zorder=5)
    gap = "new process:\nstart Python,\nimport torch"
    axes.text((death + back) / 2, 2.0, gap, ha="center", va="center", color="#555555")
    _label(axes, f"SIGKILL during the save of step {killed_step}", death, -0.72, "black", left=True)
    _label(axes, f"resumes after step {start}", back, -0.72, "black")
    _label(axes, f"✗ {killed_step}", death, 4.66, "black", left=True)
    for report in [*killed, *resumed]:
        if report["kind"] == "Committed":
            at = (report["at_seconds"] - zero, 4.66)
            axes.text(*at, str(report["step"]), ha="center", va="center", fontsize=9, color=_COLOURS["commit"])
    axes.set_ylim(4.95, -1.05)
    axes.set_title(
        "Killed during a save, resumed, trained to the end (numbers: steps made durable; ✗: torn, never visible)",
        loc="left",
    )
    axes.set_xlabel("seconds since the first process began")


def _close(axes: Axes, resumed: Sequence[Report]) -> None:
    commits = [report for report in resumed if report["kind"] == "Committed"]
    # this is neither the first save nor the last, so it has training on both sides
    chosen = commits[(len(commits) - 1) // 2]
    number = chosen["step"]
    began = next(r["at_seconds"] for r in resumed if r["kind"] == "SaveStarted" and r["step"] == number)
    ended = chosen["at_seconds"]
    steps = [report for report in resumed if report["kind"] == "Step"]
    first = max((r["marks"][0] for r in steps if r["step"] <= number), default=began)
    last = min((r["marks"][-1] for r in steps if r["marks"][-1] >= ended), default=ended)
    _bars(axes, [b for b in _timed(resumed) if b[3] > first and b[2] < last], began, scale=1e3)
    for report in steps:
        middle = (report["marks"][0] + report["marks"][-1]) / 2
        if first < middle < last:
            axes.text((middle - began) * 1e3, -0.45, f"step {report['step']}", ha="center", va="bottom", fontsize=9)
    axes.axvline(0.0, color="#555555", lw=1.0, ls=":", zorder=4)
    durable = (ended - began) * 1e3
    axes.axvline(durable, color=_COLOURS["commit"], lw=1.4, ls="--", zorder=4)
    stalls = [r for r in resumed if r["kind"] == "Stalled" and r["step"] == number]
    for place, report in enumerate(stalls):
        where = "save() returns after" if report["where"] == "save" else f"{report['where']} waits"
        at = (report["at_seconds"] - began) * 1e3
        height = 1.0 + (place - (len(stalls) - 1) / 2) * 0.34
        _label(axes, f"{where} {report['seconds'] * 1e3:.1f} ms", at, height, _COLOURS["stall"])
    _label(axes, f"durable and visible after {durable:.0f} ms", durable, 4.0, _COLOURS["commit"])
    axes.set_xlim((first - began) * 1e3, (last - began) * 1e3)
    axes.set_ylim(4.6, -0.95)
    axes.set_title(f"One save from close by: step {number}, {chosen['nbytes'] / 1e6:.0f} MB", loc="left")
    axes.set_xlabel("milliseconds since save() was called")


def _label(axes: Axes, text: str, x: float, y: float, colour: str, *, left: bool = False) -> None:
    """Write the text beside the point, on white, so that no line runs through it."""
    axes.annotate(
        text,
        (x, y),
        (-8 if left else 8, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        color=colour,
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.9},
        zorder=6,
    )


def _bars(axes: Axes, bars: Sequence[Bar], start: float, *, scale: float = 1.0) -> None:
    for name in _COLOURS:
        mine = [bar for bar in bars if bar[1] == name]
        for lane in {bar[0] for bar in mine}:
            spans = [((b - start) * scale, (e - b) * scale) for at, _, b, e in mine if at == lane]
            # an edge keeps visible what is shorter than a pixel
            thin = lane != "training"
            edge: dict[str, Any] = {"edgecolor": _COLOURS[name], "linewidth": 0.9} if thin else {}
            axes.broken_barh(spans, (_LANES.index(lane) - 0.36, 0.72), facecolors=_COLOURS[name], zorder=3, **edge)
    axes.set_yticks(range(len(_LANES)), _LANES)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", lw=0.6, zorder=0)


def _timed(reports: Sequence[Report]) -> list[Bar]:
    bars: list[Bar] = []
    for report in reports:
        kind = report["kind"]
        at = _at(report)
        if kind == "Step":
            marks = report["marks"]
            bars += [
                ("training", name, marks[i], marks[i + 1]) for i, name in enumerate(("forward", "backward", "update"))
            ]
        elif kind == "Stalled":
            bars.append(("stall", "stall", at - report["seconds"], at))
        elif kind == "ExtentStaged":
            bars.append(("staging", "staging", at - report["seconds"], at))
        elif kind == "ExtentWritten":
            bars.append(("writing", "writing", at - report["seconds"], at))
        elif kind == "Committed":
            bars.append(("commit", "commit", at - report["commit_seconds"], at))
        elif kind == "Restored":
            bars.append(("training", "restore", at - report["seconds"], at))
    return bars


def _at(report: Report) -> float:
    if report["kind"] == "Step":
        return float(report["marks"][-1])
    return float(report.get("at_seconds", 0.0))
