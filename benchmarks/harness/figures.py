"""The workers' reports become a table here: a bar, what was measured, and whether the bar was met."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.harness.runner import Event, Run

UNMEASURED = "not measured"
DCP = ("dcp_save", "dcp_async_thread", "dcp_async_process")


@dataclass(frozen=True, slots=True)
class Row:
    """Puts a figure beside its bar. ``met`` is None where nothing was measured; ``ceiling`` is what the device did in
    the same processes."""

    figure: str
    bar: str
    measured: str
    met: bool | None
    ceiling: str = ""


@dataclass(frozen=True, slots=True)
class Spread:
    """Holds a median and the extremes it lies between."""

    median: float
    low: float
    high: float
    count: int

    def text(self, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
        median, low, high = (f"{value * scale:.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{median}{unit} ({low}..{high})"


def spread(values: Iterable[float]) -> Spread | None:
    found = sorted(values)
    return Spread(statistics.median(found), found[0], found[-1], len(found)) if found else None


def chosen(runs: Sequence[Run], scenario: str, peer: str) -> list[Run]:
    return [run for run in runs if run.job.scenario == scenario and run.job.peer == peer and run.error is None]


def state_bytes(run: Run) -> int:
    return int(run.of("state")[0]["nbytes"])


def later_saves(runs: Sequence[Run]) -> list[Event]:
    """Return all saves but each process's first."""
    return [event for run in runs for event in run.of("save") if event["number"] > 1]


def durable_seconds(runs: Sequence[Run], peer: str) -> Spread | None:
    return spread(event["durable_seconds"] for event in later_saves(chosen(runs, "saves", peer)))


def ratio_to_raw(runs: Sequence[Run], peer: str) -> Spread | None:
    """Divide durable throughput by the raw one of the neighbours in time, for every save but the first."""
    found: list[float] = []
    for run in chosen(runs, "saves", peer):
        for save, before, after in _between(run, "raw"):
            if save["number"] > 1:
                found.append((before + after) / 2 / save["durable_seconds"])
    return spread(found)


def raw_throughput(runs: Sequence[Run], kind: str = "raw") -> Spread | None:
    """Return bytes a second of every raw write (``raw``), cold read (``raw_read``) or memcpy (``copy``) of these
    runs."""
    return spread(event["nbytes"] / event["seconds"] for run in runs for event in run.of(kind))


def engine_rows(runs: Sequence[Run]) -> list[Row]:
    """Return the table of the engine's bars."""
    return [
        _against_raw(runs),
        _against(runs, "torch.save + fsync", ("torch_save",), 1.5),
        _against(runs, "safetensors + fsync", ("safetensors_file",), 1.3),
        _against(runs, "the best DCP variant", DCP, 2.0),
        _against(runs, "torch_checkpointing", ("torch_checkpointing",), 2.0),
        _deferred_return(runs),
        _eager_stall(runs),
        _first_save(runs),
        _memory(runs),
        _many(runs),
        _restore(runs),
    ]


def _between(run: Run, kind: str) -> Iterator[tuple[Event, float, float]]:
    """Yield each save with the ceiling's seconds before and after it."""
    before: float | None = None
    pending: Event | None = None
    for event in run.events:
        if event["kind"] == "save":
            pending = event
        elif event["kind"] == kind:
            if pending is not None and before is not None:
                yield pending, before, event["seconds"]
            before, pending = event["seconds"], None


def _against_raw(runs: Sequence[Run]) -> Row:
    figure, bar = "durable write / raw O_DIRECT write + fsync", ">= 0.90"
    ratio = ratio_to_raw(runs, "asyncckpt")
    ours = durable_seconds(runs, "asyncckpt")
    if ratio is None or ours is None:
        return _unmeasured(figure, bar)
    nbytes = state_bytes(chosen(runs, "saves", "asyncckpt")[0])
    rate = nbytes / ours.median / 1e9
    return Row(figure, bar, f"{ratio.text()}, {rate:.2f} GB/s", ratio.median >= 0.9, _raw_text(runs, "asyncckpt"))


def _against(runs: Sequence[Run], label: str, peers: Sequence[str], bar: float) -> Row:
    figure, bar_text = f"durable write / {label}", f">= {bar:g} x"
    ours = durable_seconds(runs, "asyncckpt")
    theirs = {peer: found for peer in peers if (found := durable_seconds(runs, peer)) is not None}
    if ours is None or not theirs:
        return _unmeasured(figure, bar_text)
    peer = min(theirs, key=lambda name: theirs[name].median)
    nbytes = state_bytes(chosen(runs, "saves", peer)[0])
    ratio = theirs[peer].median / ours.median
    text = f"{ratio:.2f} x; {peer}: {nbytes / theirs[peer].median / 1e9:.2f} GB/s"
    own_raw, peer_raw = ratio_to_raw(runs, "asyncckpt"), ratio_to_raw(runs, peer)
    if own_raw is not None and peer_raw is not None:
        # each is divided by the ceiling of its own process, so that the disk's mood between two processes drops out
        text += f"; {own_raw.median / peer_raw.median:.2f} x with each over its own ceiling"
    return Row(figure, bar_text, text, ratio >= bar, _raw_text(runs, peer))


def _deferred_return(runs: Sequence[Run]) -> Row:
    figure, bar = "save() returning, deferred", "<= 5 ms after the first"
    events = later_saves(chosen(runs, "returns", "asyncckpt_deferred"))
    stalls = spread(event["stall_seconds"] for event in events)
    if stalls is None:
        return _unmeasured(figure, bar)
    ordered = sorted(event["stall_seconds"] for event in events)
    high = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    text = f"{stalls.text(2, 1e3, ' ms')}, p99 {high * 1e3:.2f} ms of {stalls.count} saves"
    return Row(figure, bar, text, stalls.median <= 0.005)


def _eager_stall(runs: Sequence[Run]) -> Row:
    figure, bar = "stall, eager / one warm memcpy", "<= 1.3 x"
    found = chosen(runs, "saves", "asyncckpt")
    ratio = spread(
        save["stall_seconds"] / min(before, after)
        for run in found
        for save, before, after in _between(run, "copy")
        if save["number"] > 1
    )
    stalls = spread(event["stall_seconds"] for event in later_saves(found))
    copies = spread(event["seconds"] for run in found for event in run.of("copy"))
    if ratio is None or stalls is None or copies is None:
        return _unmeasured(figure, bar)
    text = f"{ratio.text(unit=' x')}, {stalls.median:.3f} s"
    return Row(figure, bar, text, ratio.median <= 1.3, f"memcpy {copies.text(3, unit=' s')}")


def _first_save(runs: Sequence[Run]) -> Row:
    figure, bar = "first save / fifth", "<= 1.3 x, durable and stall"
    pairs = [
        (saves[1], saves[5])
        for run in chosen(runs, "saves", "asyncckpt")
        if {1, 5} <= (saves := {event["number"]: event for event in run.of("save")}).keys()
    ]
    durable = spread(first["durable_seconds"] / fifth["durable_seconds"] for first, fifth in pairs)
    stall = spread(first["stall_seconds"] / fifth["stall_seconds"] for first, fifth in pairs)
    if durable is None or stall is None:
        return _unmeasured(figure, bar)
    text = f"durable {durable.text(unit=' x')}, stall {stall.text(unit=' x')}"
    return Row(figure, bar, text, max(durable.median, stall.median) <= 1.3)


def _memory(runs: Sequence[Run]) -> Row:
    figure, bar = "resident memory above the state, 256 MiB staging", "<= staging_bytes + 64 MiB, saved correctly"
    found = [event for run in chosen(runs, "budget", "asyncckpt") for event in run.of("memory")]
    equal = [event["equal"] for run in chosen(runs, "budget", "asyncckpt") for event in run.of("equal")]
    if not found or not equal:
        return _unmeasured(figure, bar)
    above = max(event["above_state_bytes"] for event in found)
    allowed = max(event["staging_bytes"] for event in found) + (64 << 20)
    text = f"{above / (1 << 20):.0f} MiB, restored {'bit-equal' if all(equal) else 'DIFFERENT'}"
    return Row(figure, bar, text, above <= allowed and all(equal))


def _many(runs: Sequence[Run]) -> Row:
    figure, bar = "20,480 tensors of 64 KiB / 20 of 64 MiB, durable", "<= 1.5 x"
    found = chosen(runs, "many", "asyncckpt")
    seconds: dict[str, list[float]] = {"few": [], "many": []}
    for event in later_saves(found):
        seconds[event["state"]].append(event["durable_seconds"])
    ratio = spread(m / f for m, f in zip(seconds["many"], seconds["few"], strict=False))
    if ratio is None:
        return _unmeasured(figure, bar)
    text = f"{ratio.text(unit=' x')}, {statistics.median(seconds['many']):.2f} s"
    raw = raw_throughput(found)
    return Row(figure, bar, text, ratio.median <= 1.5, f"raw {raw.text(2, 1e-9, ' GB/s')}" if raw else "")


def _restore(runs: Sequence[Run]) -> Row:
    figure, bar = "restore, verified / raw cold O_DIRECT read", ">= 0.85, bit-equal"
    found = chosen(runs, "restores", "asyncckpt")
    equal = [event["equal"] for run in found for event in run.of("equal")]
    ratio = restore_ratio(found)
    raw = raw_throughput(found, "raw_read")
    if ratio is None or raw is None:
        return _unmeasured(figure, bar)
    seconds = statistics.median(event["seconds"] for run in found for event in run.of("restore"))
    text = f"{ratio.text()}, {state_bytes(found[0]) / seconds / 1e9:.2f} GB/s"
    if not all(equal):
        text += ", DIFFERENT"
    return Row(figure, bar, text, ratio.median >= 0.85 and all(equal), f"raw read {raw.text(2, 1e-9, ' GB/s')}")


def restore_ratio(runs: Sequence[Run]) -> Spread | None:
    return spread(
        read["seconds"] / restore["seconds"]
        for run in runs
        for read, restore in zip(run.of("raw_read"), run.of("restore"), strict=False)
    )


def _raw_text(runs: Sequence[Run], peer: str) -> str:
    raw = raw_throughput(chosen(runs, "saves", peer))
    return f"raw {raw.text(2, 1e-9, ' GB/s')}" if raw else ""


def _unmeasured(figure: str, bar: str) -> Row:
    return Row(figure, bar, UNMEASURED, None)
