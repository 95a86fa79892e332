"""Draws the figures of a report, with plotly."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from asyncckpt.report.facts import Facts, Point

#: What a checkpoint's state looks like: a colour that is told apart without seeing colours well, and a shape.
LOOKS = {
    "kept": ("#0072b2", "circle"),
    "pinned": ("#009e73", "square"),
    "deleted": ("#9a9a9a", "circle-open"),
    "damaged": ("#d55e00", "x"),
}
_TROUBLE = {
    "failed": ("save failed", "#d55e00", "x"),
    "fallback": ("fell back", "#cc79a7", "triangle-down"),
    "restore": ("restored", "#009e73", "triangle-up"),
    "delete": ("deletion", "#9a9a9a", "line-ns-open"),
    "thin": ("thinned out", "#56b4e9", "diamond-open"),
}
#: Of more metrics than these, those that most checkpoints have are drawn.
_METRICS = 12


def timeline(facts: Facts) -> go.Figure | None:
    """Draw when checkpoints were saved, and what else happened: steps against the clock."""
    timed = [point for point in facts.points if point.at_unix_seconds is not None]
    if not timed:
        return None
    figure = go.Figure()
    for state, (colour, symbol) in LOOKS.items():
        _add(figure, [p for p in timed if p.state == state], state, colour, symbol, _when, lambda p: p.step)
    for what, (title, colour, symbol) in _TROUBLE.items():
        lines = [line for line in facts.journal if line.what == what]
        if lines:
            figure.add_scatter(
                x=[_time(line.at_unix_seconds) for line in lines],
                y=[line.step for line in lines],
                mode="markers",
                name=title,
                marker={"color": colour, "symbol": symbol, "size": 12, "line": {"width": 2}},
                text=[html.escape(line.text("reason")) or html.escape(line.name) for line in lines],
                hovertemplate=f"{title}, step %{{y}}<br>%{{text}}<extra></extra>",
            )
    return _finished(figure, "time (UTC)", "step")


def speed(facts: Facts) -> go.Figure | None:
    """Draw what each save cost: stall, time until durable, and how fast its bytes were written."""
    timed = [point for point in facts.points if point.durable_seconds is not None]
    if not timed:
        return None
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.6, 0.4])
    for title, colour, of in (
        ("until durable", "#0072b2", lambda p: p.durable_seconds),
        ("training stalled", "#d55e00", lambda p: p.stall_seconds),
    ):
        _add(figure, timed, title, colour, "circle", lambda p: p.step, of, row=1)
    _add(figure, timed, "written, GB/s", "#009e73", "circle", lambda p: p.step, lambda p: p.gigabytes_a_second, row=2)
    figure.update_yaxes(title_text="seconds", type="log", row=1, col=1)
    figure.update_yaxes(title_text="GB/s", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title_text="step", row=2, col=1)
    return _finished(figure, None, None, height=460)


def sizes(facts: Facts) -> go.Figure | None:
    """Draw what each save wrote, what it linked, and what compression saved."""
    sized = [point for point in facts.points if point.written_bytes is not None]
    if not sized:
        sized = [point for point in facts.points if point.nbytes]
        rows: list[tuple[str, str, Callable[[Point], float | None]]] = [("size", "#0072b2", lambda p: float(p.nbytes))]
    else:
        rows = [
            ("written", "#0072b2", lambda p: p.written_bytes),
            ("linked", "#56b4e9", lambda p: p.linked_bytes),
            ("saved by compression", "#dddddd", lambda p: p.compressed_bytes),
        ]
    if not sized:
        return None
    figure = go.Figure()
    for title, colour, of in rows:
        values = [(of(point) or 0.0) / 1e6 for point in sized]
        if any(values) or title == "written":
            figure.add_bar(
                x=[_label(point) for point in sized],
                y=values,
                name=title,
                marker={"color": colour},
                hovertemplate="%{x}<br>%{y:.1f} MB " + title + "<extra></extra>",
            )
    figure.update_layout(barmode="stack")
    return _finished(figure, "save", "MB")


def metrics(facts: Facts) -> go.Figure | None:
    """Draw each metric against the step, with what became of the checkpoint."""
    names = facts.metrics[:_METRICS]
    if not names:
        return None
    figure = make_subplots(
        rows=len(names), cols=1, shared_xaxes=True, vertical_spacing=0.3 / max(3, len(names)), subplot_titles=[
            html.escape(name) for name in names
        ]
    )  # fmt: skip
    for row, name in enumerate(names, 1):

        def value(point: Point, name: str = name) -> float | None:
            return point.metrics.get(name)

        have = sorted((point for point in facts.points if name in point.metrics), key=lambda point: point.step)
        figure.add_scatter(
            x=[point.step for point in have],
            y=[_finite(value(point)) for point in have],
            mode="lines",
            line={"color": "#cccccc", "width": 1},
            hoverinfo="skip",
            showlegend=False,
            row=row,
            col=1,
        )
        for state, (colour, symbol) in LOOKS.items():
            chosen = [point for point in have if point.state == state]
            _add(figure, chosen, state, colour, symbol, lambda p: p.step, value, row=row, group=True, legend=row == 1)
        best = [point for point in have if point.name == facts.best.get(name)]
        _add(figure, best, "best", "#e69f00", "star", lambda p: p.step, value, row=row, group=True, size=16)
    figure.update_xaxes(title_text="step", row=len(names), col=1)
    return _finished(figure, None, None, height=120 + 200 * len(names))


def _add(
    figure: go.Figure,
    points: Sequence[Point],
    title: str,
    colour: str,
    symbol: str,
    x: Callable[[Point], Any],
    y: Callable[[Point], Any],
    *,
    row: int | None = None,
    group: bool = False,
    legend: bool = True,
    size: int = 9,
) -> None:
    if not points:
        return
    place = {"row": row, "col": 1} if row is not None else {}
    shown = legend and not any(trace.name == title for trace in figure.data)
    figure.add_scatter(
        x=[x(point) for point in points],
        y=[_finite(y(point)) for point in points],
        mode="markers" if group or row is None else "lines+markers",
        name=title,
        legendgroup=title,
        showlegend=shown if group else legend,
        marker={"color": colour, "symbol": symbol, "size": size, "line": {"width": 1, "color": colour}},
        text=[_told(point) for point in points],
        hovertemplate="%{text}<br>" + title + ": %{y}<extra></extra>",
        **place,
    )


def _finite(value: Any) -> Any:
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _label(point: Point) -> str:
    return f"{point.step}" if point.kind == "full" else f"{point.step} ({html.escape(point.kind)})"


def _told(point: Point) -> str:
    rows = [f"<b>{html.escape(point.name)}</b> ({point.state})"]
    rows += [f"{html.escape(name)} = {value:.6g}" for name, value in list(point.metrics.items())[:8]]
    return "<br>".join(rows)


def _when(point: Point) -> datetime:
    return _time(point.at_unix_seconds or 0.0)


def _time(seconds: float) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):  # a clock that was wrong, or a line that somebody forged
        return datetime.fromtimestamp(0, UTC)


def _finished(figure: go.Figure, x: str | None, y: str | None, height: int = 380) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        font={"family": "system-ui, sans-serif", "size": 13},
        hovermode="closest",
    )
    if x is not None:
        figure.update_xaxes(title_text=x)
    if y is not None:
        figure.update_yaxes(title_text=y)
    return figure
