"""``python -m benchmarks scale`` simulates large jobs, runs real ranks on this host, and prints the bars."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import environment
from benchmarks.harness.figures import Row, spread
from benchmarks.harness.report import tell
from benchmarks.harness.results import Result, Table
from benchmarks.suites.light.bars import cells
from benchmarks.suites.scale import leading, rereading, simulated

TITLE = "Thousands of ranks"
HEAD = ("figure", "bar", "measured: median (min..max)", "met")
SIZES = (2, 16, 32)
_TIMEOUT_SECONDS = 600.0
_SHOWN_CHARACTERS = 4000
_PLAN_BAR_SECONDS = 1.0
_MOST_OPENED, _LEAST_WRITE_BYTES = 8, 4 << 20
_BALANCE_BAR, _GROWTH_BAR, _REREAD_BAR = 1.1, 1.2, 1.1
_MOST_FILES = 2
_JUDGED_RANKS = 4096
_MERGE_BARS = {(19_200, 16): 0.1, (100_000, 16): 0.5}


def run(
    directory: Path,
    rounds: int,
    out: Path | None,
    as_json: bool,
    console: Console,
    sizes: Sequence[int] = SIZES,
    *,
    quick: bool = False,
) -> Result:
    """Measure, print and return the result; progress goes to stderr. ``sizes``: the jobs of real ranks. ``quick``: only
    show that all of it works, with jobs that are too small to be judged. ``out`` is the folder for ``scale.json`` and
    ``scale.md``. Raises ``RuntimeError`` where a job fails."""
    progress = Console(stderr=True)
    progress.print("planning and merging, simulated")
    plans, merges, common = simulated.plans(), simulated.merges(), simulated.leaders()
    balances = simulated.balances(2 if quick else 64)
    leaders = leading.leaders(leading.QUICK if quick else leading.SIZES)
    reread = rereading.ratios(rereading.QUICK if quick else rereading.JOBS)
    jobs: list[dict[str, Any]] = []
    for number in range(rounds):
        for ranks in sizes:
            progress.print(f"round {number + 1}: {ranks} ranks")
            jobs.append(run_job(ranks, directory))
    made_up = [row for plan in plans for row in _plan(plan)]
    made_up += [*map(_balance, balances), *map(_merge, merges), *map(_common, common)]
    made_up += [row for leader in leaders for row in _leader(leader)]
    made_up += [] if quick else [_growth(leaders)]
    rows = [*made_up, *map(_reread, reread), *(row for ranks in sizes for row in _job(ranks, jobs))]
    described = environment.describe(str(directory))
    data = {
        "options": {"suite": "scale", "rounds": rounds},
        "bars": [asdict(row) for row in rows],
        "plans": plans,
        "balances": balances,
        "common": common,
        "merges": merges,
        "leaders": leaders,
        "reread": reread,
        "jobs": jobs,
    }
    tables = [Table(TITLE, HEAD, [cells(row) for row in rows])]
    asked = f"python -m benchmarks scale --rounds {rounds}"
    result = Result("scale", asked, described, tables, f"{environment.sentence(described)}.", data)
    tell(result, [row.met for row in rows], console, out=out, as_json=as_json)
    return result


def run_job(ranks: int, directory: Path) -> dict[str, Any]:
    """Return what a job of so many processes reports. Blocks. Raises ``RuntimeError`` with the end of its output where
    it fails."""
    with tempfile.TemporaryDirectory(prefix="asyncckpt-bench-", dir=directory) as folder:
        events = Path(folder) / "events.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "benchmarks.suites.scale.worker", str(Path(folder) / "run"), str(events)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise RuntimeError(f"{ranks} ranks failed with {done.returncode}:\n{done.stderr[-_SHOWN_CHARACTERS:]}")
        found: dict[str, Any] = json.loads(events.read_text())
        return found


def _plan(event: dict[str, Any]) -> list[Row]:
    layout = "files by rank" if event["by_rank"] else "common files"
    seconds, opened = event["seconds"], event["opened"]
    written = f"{opened:,} of {event['nbytes'] / 1e9:.2f} GB, by {event['median_extent_bytes'] / 2**20:.1f} MiB"
    met = opened <= _MOST_OPENED and event["median_extent_bytes"] >= _LEAST_WRITE_BYTES if event["by_rank"] else None
    planned = f"{seconds:.2f} s, {event['grown_bytes'] / 2**20:.0f} MiB for {event['tensors']:,} tensors"
    bar = "<= 8; >= 4 MiB" if event["by_rank"] else "reported"
    rows = [
        Row(f"a rank's first plan, {event['job']}, {layout}", "<= 1 s", planned, seconds <= _PLAN_BAR_SECONDS),
        Row("data files that it opens; median write", bar, written, met),
    ]
    if event["by_rank"]:
        files = opened + 1  # and its part of the manifest
        rows.append(Row("files of the checkpoint, a rank", f"<= {_MOST_FILES}", str(files), files <= _MOST_FILES))
    return rows


def _balance(event: dict[str, Any]) -> Row:
    text = f"{event['busiest_over_mean']:.3f}; the least {event['least_over_mean']:.3f}"
    return Row(
        f"busiest rank over the mean, {event['job']}", "<= 1.1", text, event["busiest_over_mean"] <= _BALANCE_BAR
    )


def _merge(event: dict[str, Any]) -> Row:
    parameters, stages = event["parameters"], event["stages"]
    bar = _MERGE_BARS.get((parameters, stages))
    met = None if bar is None else event["seconds"] <= bar
    figure = f"uniting the optimizers of {stages} stages, {parameters:,} parameters"
    return Row(figure, f"<= {bar:g} s" if bar else "reported", f"{event['seconds']:.3f} s", met)


def _common(event: dict[str, Any]) -> Row:
    text = f"{event['seconds']:.2f} s, {event['nbytes'] / 1e6:.1f} MB of manifest"
    figure = f"rank 0 merges {event['ranks']:,} ranks x {event['extents']} extents of common files"
    return Row(figure, "reported", text, None)


def _leader(event: dict[str, Any]) -> list[Row]:
    ranks, judged = event["ranks"], event["ranks"] == _JUDGED_RANKS
    lead = f"rank 0, {ranks:,} ranks x {event['extents']:,} extents in parts"

    def row(figure: str, value: float, bar: float, shown: str, unit: str) -> Row:
        return Row(
            f"{lead}: {figure}", f"<= {bar:g}{unit}" if judged else "reported", shown, value <= bar if judged else None
        )

    seconds, lost, longest = event["seconds"], event["lost_seconds"], 1000 * event["longest_seconds"]
    grown, opened = event["grown_bytes"] / 2**20, event["open_seconds"]
    root = f"{event['nbytes'] / 1e6:.2f} MB of root, {event['part_bytes'] / 1e6:.2f} of a part"
    return [
        row("processor time", seconds, 0.5, f"{seconds:.3f} s (the first {event['first_seconds']:.3f}); {root}", " s"),
        row("taken from a thread in pure Python", lost, 0.1, f"{lost:.3f} s", " s"),
        row("at once", longest, 20, f"{longest:.0f} ms", " ms"),
        row("memory", grown, 128, f"{grown:.0f} MiB", " MiB"),
        row("a rank parses the root and its part", opened, 0.1, f"{opened:.3f} s", " s"),
    ]


def _reread(event: dict[str, Any]) -> Row:
    figure = f"bytes read over those needed, {event['job']} of {event['ranks']:,} ranks on {event['other']:,}"
    return Row(figure, "<= 1.1 x", f"{event['ratio']:.3f} x", event["ratio"] <= _REREAD_BAR)


def _growth(leaders: Sequence[dict[str, Any]]) -> Row:
    large = [event["seconds"] for event in leaders if event["ranks"] == _JUDGED_RANKS]
    ratio = large[-1] / large[0]
    return Row("rank 0 with four times the extents", "<= 1.2 x", f"{ratio:.2f} x", ratio <= _GROWTH_BAR)


def _job(ranks: int, jobs: Sequence[dict[str, Any]]) -> list[Row]:
    found = [job for job in jobs if job["ranks"] == ranks]
    rows: list[Row] = []
    largest = ranks == max(job["ranks"] for job in jobs)
    phases = (("prepare", "ready", 2.0), ("returned 2", "second save() returned", 0.05))
    for phase, what, bar in (*phases, ("durable 2", "second save durable", None), ("restore", "restored", None)):
        seconds = spread(job[phase] for job in found)
        if seconds is None:
            continue
        met = seconds.median <= bar if largest and bar is not None else None
        text = f"<= {bar:g} s" if met is not None else "reported"
        rows.append(Row(f"{ranks} ranks on this host: {what}, slowest", text, seconds.text(3, unit=" s"), met))
    return rows
