"""The events of the workers become a table: a bar, what was measured, and whether the bar was met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness.figures import Row, spread

#: An event of a worker, with the scenario and the number of tensors that it is of.
Event = dict[str, Any]
HEAD = ("figure", "bar", "measured: median (min..max)", "met")
_RETURN_BARS = {600: 0.003, 24_000: 0.010, 80_000: 0.030}
_LOST_BARS = {600: 0.030, 24_000: 0.150}
_RESTORE_BARS = {24_000: 0.6, 80_000: 2.0}
_LONGEST_SECONDS = 0.005
_LOOP_BARS = {"busy": 0.05, "device": 0.02}


def rows(events: Sequence[Event]) -> list[Row]:
    """Return the rows of all bars that something was measured for."""
    found = [_return(events, tensors, bar) for tensors, bar in _RETURN_BARS.items()]
    for tensors, bar in _LOST_BARS.items():
        found += _lost(events, tensors, bar)
    found += [_loop(events, loop, bar) for loop, bar in _LOOP_BARS.items()]
    found += [_restore(events, tensors, bar) for tensors, bar in _RESTORE_BARS.items()]
    found += [_eager(events), _durable(events, "durable", 0.95), _durable(events, "budget", 0.9), _first_step(events)]
    return [row for row in found if row is not None]


def cells(row: Row) -> Sequence[str]:
    """Return a row as text."""
    return row.figure, row.bar, row.measured, {True: "yes", False: "no", None: "-"}[row.met]


def _of(events: Sequence[Event], scenario: str, tensors: int | None = None) -> list[Event]:
    return [e for e in events if e["scenario"] == scenario and (tensors is None or e["tensors"] == tensors)]


def _return(events: Sequence[Event], tensors: int, bar: float) -> Row | None:
    found = _of(events, "returns", tensors)
    seconds = spread(event["return_seconds"] for event in found)
    waited = spread(event["step_seconds"] - event["quiet_step_seconds"] for event in found)
    durable = spread(event["durable_seconds"] for event in found)
    if seconds is None or waited is None or durable is None:
        return None
    text = f"{seconds.text(2, 1e3, ' ms')}; next step + {waited.text(1, 1e3, ' ms')}; durable {durable.text()} s"
    figure = f"deferred save() returning, {tensors:,} tensors"
    return Row(figure, f"<= {bar * 1e3:g} ms", text, seconds.median <= bar)


def _lost(events: Sequence[Event], tensors: int, bar: float) -> list[Row | None]:
    found = _of(events, "interpreter", tensors)
    lost = spread(event["lost_seconds"] for event in found)
    longest = spread(event["longest_seconds"] for event in found)
    quiet = spread(event["quiet_longest_seconds"] for event in found)
    if lost is None or longest is None or quiet is None:
        return []
    full = sum(event["full_collections"] for event in found)
    what = f"{tensors:,} tensors"
    at_once = f"{longest.text(1, 1e3, ' ms')}; without a save {quiet.text(1, 1e3, ' ms')}"
    return [
        Row(
            f"interpreter that a save takes, {what}",
            f"<= {bar * 1e3:g} ms",
            lost.text(1, 1e3, " ms"),
            lost.median <= bar,
        ),
        Row(
            f"of that at once, {what}",
            f"<= {_LONGEST_SECONDS * 1e3:g} ms",
            at_once,
            longest.median <= max(_LONGEST_SECONDS, quiet.median),
        ),
        Row(f"full garbage collections in {len(found)} saves, {what}", "0", str(full), full == 0),
    ]


def _loop(events: Sequence[Event], loop: str, bar: float) -> Row | None:
    found = [event for event in _of(events, "loops") if event["loop"] == loop]
    slower = spread(event["slower"] for event in found)
    if slower is None:
        return None
    text = f"{slower.text(1, 100, ' %')}, {sum(event['saves'] for event in found)} saves"
    return Row(f"{loop}-bound loop, saving always, is slower by", f"<= {bar:.0%}", text, slower.median <= bar)


def _restore(events: Sequence[Event], tensors: int, bar: float) -> Row | None:
    seconds = spread(event["restore_seconds"] for event in _of(events, "restores", tensors))
    if seconds is None:
        return None
    return Row(f"restore, {tensors:,} tensors", f"<= {bar:g} s", seconds.text(2, unit=" s"), seconds.median <= bar)


def _eager(events: Sequence[Event]) -> Row | None:
    ratio = spread(event["stall_seconds"] / event["copy_seconds"] for event in _of(events, "eager"))
    if ratio is None:
        return None
    return Row("stall, eager / one warm memcpy", "<= 1.3 x", ratio.text(unit=" x"), ratio.median <= 1.3)


def _durable(events: Sequence[Event], scenario: str, bar: float) -> Row | None:
    found = _of(events, scenario)
    ratio = spread(event["raw_seconds"] / event["durable_seconds"] for event in found)
    if ratio is None:
        return None
    gigabytes = found[0]["nbytes"] / 1e9
    what = f"durable / raw write, {gigabytes:.1f} GB" + (" through 256 MiB" if scenario == "budget" else "")
    rate = spread(event["nbytes"] / event["raw_seconds"] / 1e9 for event in found)
    small = spread(event["nbytes"] / event["raw_small_pages_seconds"] / 1e9 for event in found)
    text = f"{ratio.text()}; raw {rate.text() if rate else '-'} GB/s, from small pages {small.text() if small else '-'}"
    return Row(what, f">= {bar:g}", text, ratio.median >= bar)


def _first_step(events: Sequence[Event]) -> Row | None:
    found = _of(events, "first_step")
    parts = ("start", "import", "model", "resume", "step", "whole")
    spreads = {part: spread(event[f"{part}_seconds"] for event in found) for part in parts}
    texts = [f"{part} {one.median:.2f}" for part, one in spreads.items() if one is not None]
    if not texts:
        return None
    return Row("process start to the first resumed step, s", "reported", ", ".join(texts), None)
