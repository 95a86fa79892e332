"""What the jobs reported becomes the table of bars here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness.figures import UNMEASURED, Row, spread
from benchmarks.suites.ranks.simulation import Planning

HEAD = ("figure", "bar", "measured: median (min..max)", "met", "ceiling, same processes")
DCP = ("dcp_async_thread", "dcp_async_process")
_MET = {True: "yes", False: "no", None: "-"}
_ALONE, _TALK, _DURABLE, _STALL, _RESTORE, _SHARE, _READ = 0.9, 2, 2.0, 0.5, 0.8, 0.05, 1.05

Event = Mapping[str, Any]


def cells(row: Row) -> tuple[str, ...]:
    return (row.figure, row.bar, row.measured, _MET[row.met], row.ceiling)


def rows(events: Sequence[Event], planning: Planning) -> list[Row]:
    """Return all bars; those of world sizes that were not run are left unmeasured."""
    found = [_against_alone(events, ranks) for ranks in (2, 4)]
    for ranks in (2, 4):
        found += _against_dcp(events, ranks)
    found.append(_staged(events))
    found.append(_read(events))
    found.append(_messages(events))
    found += [_restore(events, before, after) for before, after in ((4, 2), (2, 4))]
    text = f"{planning.once_seconds:.1f} s; {planning.again_seconds * 1e3:.0f} ms; {planning.grown_bytes >> 20} MiB"
    met = planning.once_seconds < 10 and planning.again_seconds < 0.1
    found.append(Row("planning 10,000 tensors x 1,024 ranks (simulated): once; then; memory", "s; ms", text, met))
    return found


def _saves(events: Sequence[Event], ranks: int, peer: str) -> list[Event]:
    return [e for e in events if e["kind"] == "save" and e["ranks"] == ranks and e["peer"] == peer]


def _raw_text(events: Sequence[Event], ranks: int) -> str:
    raw = spread(e["nbytes"] / e["seconds"] for e in events if e["kind"] == "raw" and e["ranks"] == ranks)
    return f"raw {raw.text(2, 1e-9)} GB/s" if raw else ""


def _against_alone(events: Sequence[Event], ranks: int) -> Row:
    figure, bar = f"durable, {ranks} ranks FSDP2 / 1 process", f">= {_ALONE:.1f} x"
    alone, ours = (spread(e["durable_seconds"] for e in _saves(events, n, "asyncckpt")) for n in (1, ranks))
    if alone is None or ours is None:
        return Row(figure, bar, UNMEASURED, None)
    ratio = alone.median / ours.median
    text = f"{ratio:.2f} x; {ours.text(2, 1, ' s')} against {alone.text(2, 1, ' s')}"
    return Row(figure, bar, text, ratio >= _ALONE, _raw_text(events, ranks))


def _against_dcp(events: Sequence[Event], ranks: int) -> list[Row]:
    """Compare with whichever variant is better at each."""
    durable = f"durable, dcp.async_save / asyncckpt, {ranks} ranks"
    stall = f"stall, asyncckpt / dcp.async_save, {ranks} ranks"
    ours = _saves(events, ranks, "asyncckpt")
    theirs = [saves for peer in DCP if (saves := _saves(events, ranks, peer))]
    if not ours or not theirs:
        return [Row(durable, f">= {_DURABLE:g} x", UNMEASURED, None), Row(stall, f"<= {_STALL:g} x", UNMEASURED, None)]
    found: list[tuple[float, float]] = []
    for column in ("durable_seconds", "stall_seconds"):
        best = min(statistics.median(e[column] for e in saves) for saves in theirs)
        found.append((statistics.median(e[column] for e in ours), best))
    (quick, slow), (short, long) = found
    return [
        Row(
            durable,
            f">= {_DURABLE:g} x",
            f"{slow / quick:.2f} x; {slow:.2f} s against {quick:.2f} s",
            slow / quick >= _DURABLE,
            _raw_text(events, ranks),
        ),
        Row(
            stall,
            f"<= {_STALL:g} x",
            f"{short / long:.2f} x; {short * 1e3:.1f} ms against {long * 1e3:.1f} ms",
            short / long <= _STALL,
        ),
    ]


def _staged(events: Sequence[Event]) -> Row:
    figure, bar = "DDP, 4 ranks: bytes staged, of the state", f"1/4 +- {100 * _SHARE:.0f} %"
    shares = [n / e["state_bytes"] for e in events if e["kind"] == "staged" for n in e["nbytes"]]
    if not shares:
        return Row(figure, bar, UNMEASURED, None)
    met = all(abs(4 * share - 1) <= _SHARE for share in shares)
    return Row(figure, bar, f"{min(shares):.4f}..{max(shares):.4f}", met)


def _read(events: Sequence[Event]) -> Row:
    figure, bar = "DDP, 4 ranks: bytes read by all to resume, of the state", f"<= {_READ} x"
    ways = [[e for e in events if e["kind"] == "resumed" and e["together"] is together] for together in (True, False)]
    if not all(ways):
        return Row(figure, bar, UNMEASURED, None)
    most = [max(e["nbytes"] / e["state_bytes"] for e in way) for way in ways]
    texts = [f"{n:.3f} x in {min(e['seconds'] for e in way):.2f} s" for n, way in zip(most, ways, strict=True)]
    return Row(figure, bar, f"{texts[0]}; each for itself {texts[1]}", most[0] <= _READ)


def _messages(events: Sequence[Event]) -> Row:
    figure, bar = "messages of a rank (not 0) a save, steady state", f"<= {_TALK}"
    found = [e["messages"] for e in events if e.get("messages") and e["ranks"] > 1]
    return Row(figure, bar, str(max(found)), max(found) <= _TALK) if found else Row(figure, bar, UNMEASURED, None)


def _restore(events: Sequence[Event], before: int, after: int) -> Row:
    figure, bar = f"restore, {before} -> {after} ranks, verified / raw cold read", f">= {_RESTORE} x"
    found = [e for e in events if e["kind"] == "restore" and (e["before"], e["ranks"]) == (before, after)]
    ratio = spread(e["raw_seconds"] / e["seconds"] for e in found)
    if ratio is None:
        return Row(figure, bar, UNMEASURED, None)
    seconds = spread(e["seconds"] for e in found)
    text = f"{ratio.text()} x; {seconds.text(2, 1, ' s') if seconds else ''}"
    raw = spread(e["raw_seconds"] for e in found)
    return Row(figure, bar, text, ratio.median >= _RESTORE, f"raw {raw.text(2, 1, ' s')}" if raw else "")
