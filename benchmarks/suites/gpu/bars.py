"""The events of the GPU's workers become a table of contenders and a table of bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness.figures import Row, Spread, spread
from benchmarks.suites.gpu.contenders import CONTENDERS, NOTHING

#: An event of a worker, with the ``scenario`` and the ``contender`` that it is of.
Event = dict[str, Any]
HEAD = (
    "contender",
    "stall ms",
    "drag ms",
    "of that, first 8 its",
    "last 2 its ms",
    "worst it. ms",
    "durable GB/s",
    "to the host GB/s",
    "restore GB/s",
    "interpreter ms",
    "device GB",
    "host GB",
)
BAR_HEAD = ("figure", "bar", "measured: median (min..max)", "met")
_OURS = "device"
_GB = 1e-9


def table(events: Sequence[Event], errors: dict[str, str]) -> list[list[str]]:
    """Return a row for each contender that was measured, or that failed."""
    rows: list[list[str]] = []
    for contender in (NOTHING, *CONTENDERS):
        found = _of(events, contender)
        if contender in errors:
            rows.append([contender, errors[contender].splitlines()[-1][:200], *[""] * (len(HEAD) - 2)])
        elif any(event["kind"] == "window" for event in found):
            rows.append([contender, *_cells(found, contender)])
    return rows


def _cells(found: Sequence[Event], contender: str) -> list[str]:
    nbytes = next((event["nbytes"] for event in found if event["kind"] == "state"), 0)
    names = ("stall_seconds", "drag_seconds", "first_drag_seconds", "commit_seconds", "worst_seconds")
    cells = [_text(_spread(found, "window", name), 1, 1e3) for name in names]
    durable = spread(nbytes / event["durable_seconds"] for event in found if event["kind"] == "window")
    cells.append("-" if contender == NOTHING else _text(durable, 2, _GB))
    for kind in ("drain", "restore"):
        cells.append(_text(_spread(found, kind, "bytes_per_second"), 2, _GB))
    cells.append(_text(_spread(found, "interpreter", "lost_seconds"), 1, 1e3))
    for name in ("device_bytes", "host_bytes"):
        cells.append(_text(_spread(found, "memory", name), 2, _GB))
    return cells


def bars(events: Sequence[Event]) -> list[Row]:
    """Return the bars that something was measured for."""
    quiet = _spread(_of(events, NOTHING), "window", "drag_seconds")
    drag = _spread(_of(events, _OURS), "window", "drag_seconds")
    first = _spread(_of(events, _OURS), "window", "first_drag_seconds")
    quiet_first = _spread(_of(events, NOTHING), "window", "first_drag_seconds")
    rows = [
        _above("drag of a whole save, device", drag, quiet, 0.005),
        _above("drag of its first 8 iterations", first, quiet_first, 0.005),
        _above("the same, writers in threads", _drag(events, "device, threads"), quiet, 0.010),
        _above("drag, deferred from host memory", _drag(events, "deferred"), quiet, 0.015),
        _most("save() returning, device", _spread(_of(events, _OURS), "window", "stall_seconds"), 0.005),
        _most("... watched", _spread(_of(events, "device, watched"), "window", "stall_seconds"), 0.005),
        _most("... 24,000 tensors", _spread(_of(events, _OURS, "many"), "returns", "return_seconds"), 0.010),
        _share("to the host, of the bus", _rate(events, "drain"), _ceiling(events, "bus", "bytes_per_second"), 0.93),
        _share("durable, of the raw disk", _durable(events), _ceiling(events, "disk", "write_bytes_per_second"), 0.95),
        _share(
            "restore, of the disk",
            _rate(events, "restore"),
            _ceiling(events, "disk", "read_bytes_per_second"),
            0.95,
        ),
        _times("drag of device, planes, of device", _drag(events, "device, planes"), drag),
        _times("drag of device, zarr, of device", _drag(events, "device, zarr"), drag),
        _grown(events),
    ]
    return [row for row in rows if row is not None]


def _of(events: Sequence[Event], contender: str, scenario: str = "loop") -> list[Event]:
    return [event for event in events if event["contender"] == contender and event["scenario"] == scenario]


def _spread(found: Sequence[Event], kind: str, name: str) -> Spread | None:
    return spread(event[name] for event in found if event["kind"] == kind and name in event)


def _drag(events: Sequence[Event], contender: str) -> Spread | None:
    return _spread(_of(events, contender), "window", "drag_seconds")


def _rate(events: Sequence[Event], kind: str) -> Spread | None:
    return _spread(_of(events, _OURS), kind, "bytes_per_second")


def _durable(events: Sequence[Event]) -> Spread | None:
    found = _of(events, _OURS)
    nbytes = next((event["nbytes"] for event in found if event["kind"] == "state"), 0)
    return spread(nbytes / event["durable_seconds"] for event in found if event["kind"] == "window")


def _ceiling(events: Sequence[Event], kind: str, name: str) -> Spread | None:
    return spread(event[name] for event in events if event["scenario"] == "ceilings" and event["kind"] == kind)


def _text(found: Spread | None, digits: int, scale: float) -> str:
    return "-" if found is None else found.text(digits, scale)


def _above(figure: str, found: Spread | None, quiet: Spread | None, bar: float) -> Row | None:
    if found is None or quiet is None:
        return None
    more = found.median - quiet.median
    measured = f"{more * 1e3:+.1f} ms: {found.text(1, 1e3)} with, {quiet.text(1, 1e3)} without a save"
    return Row(figure, f"<= {bar * 1e3:g} ms above none", measured, more <= bar)


def _most(figure: str, found: Spread | None, bar: float) -> Row | None:
    return (
        None if found is None else Row(figure, f"<= {bar * 1e3:g} ms", found.text(1, 1e3, " ms"), found.median <= bar)
    )


def _share(figure: str, found: Spread | None, ceiling: Spread | None, bar: float) -> Row | None:
    if found is None or ceiling is None:
        return None
    share = found.median / ceiling.median
    measured = f"{share:.2f}: {found.text(2, _GB)} of {ceiling.text(2, _GB)} GB/s"
    return Row(figure, f">= {bar:g}", measured, share >= bar)


def _times(figure: str, found: Spread | None, than: Spread | None) -> Row | None:
    if found is None or than is None:
        return None
    measured = f"{found.text(1, 1e3)} against {than.text(1, 1e3)} ms"
    return Row(figure, "<= 1.2 x", measured, found.median <= 1.2 * max(than.median, 0.0))


def _grown(events: Sequence[Event]) -> Row | None:
    found = _of(events, _OURS)
    first, last = _spread(found, "memory", "device_bytes"), _spread(found, "reserved", "device_bytes")
    if first is None or last is None:
        return None
    measured = f"{first.median * _GB:.3f} and {last.median * _GB:.3f} GB"
    return Row("device memory after the first saves and the last", "equal", measured, first.median == last.median)
