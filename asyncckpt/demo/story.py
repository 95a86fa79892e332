"""The demo is told here from its beginning to its end; each part is a function, and the last one sums up."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from asyncckpt.demo import measure
from asyncckpt.demo.child import ChildFailed, Report, follow
from asyncckpt.demo.compare import Comparison, compare
from asyncckpt.demo.data import collect
from asyncckpt.demo.picture import draw
from asyncckpt.demo.place import Place
from asyncckpt.demo.show import Advance, Show
from asyncckpt.run import Run

#: The kill comes from another process, so a save may be durable before it; then the next save is tried.
_KILL_ATTEMPTS = 3


def tell(out: Path, *, steps: int, every: int, rounds: int) -> int:
    """Run all parts; return 0 where the resumed run is bit-equal to the uninterrupted one, 1 otherwise."""
    place, show = Place(out), Show()
    place.prepare()
    show.heading("Real text: the sources of this Python's standard library")
    show.fact(f"{collect(place.corpus) / 1e6:.1f} MB of bytes in {place.corpus}")

    show.heading(f"Run 1: {steps} steps, not interrupted, saved only at the end")
    reference = _train(show, place, place.uninterrupted, "training", steps)

    killed, killed_step = _killed_run(show, place, steps, every)

    show.heading("Run 3: a new process, seeded differently, resumes from the newest checkpoint that verifies")
    arguments: list[str | Path] = ["--every", str(every), "--seed", "2", "--trace", place.trace]
    resumed = _train(show, place, place.interrupted, "training", steps, *arguments)
    start = next(report["start"] for report in resumed if report["kind"] == "Ready")
    left = _attempts(place.interrupted)
    show.fact(f"resumed after step {start}, every byte verified, and went on to step {steps}", good=start > 0)
    show.fact("the torn attempt is gone" if not left else f"the torn attempt is still there: {left[0]}", good=not left)

    equal = _compare(show, place, steps, reference, [*killed, *resumed]) and start > 0 and not left

    _measure(show, place, rounds)

    show.heading("Picture")
    draw(killed, resumed, killed_step, place.picture)
    show.fact(f"{place.picture}: training, staging, writing and commit on one time axis")
    show.fact(f"{place.trace}: the same of run 3 for https://ui.perfetto.dev")

    _sum_up(show, place, killed_step, start, steps, equal)
    return 0 if equal else 1


def _train(show: Show, place: Place, run: Path, what: str, steps: int, *more: str | Path) -> list[Report]:
    arguments = ["--run", run, "--corpus", place.corpus, "--steps", str(steps), *more]
    with show.progress(what, steps) as advance:
        reports, _ = follow("asyncckpt.demo.train", arguments, place.log, _Watcher(advance))
    return reports


class _Watcher:
    """Turns reports into progress."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._done = 0
        self._save = ""

    def __call__(self, report: Report) -> None:
        match report["kind"]:
            case "Ready":
                self._done = report["start"]
                self._advance(self._done, "ready")
            case "Step":
                self._done = report["step"]
                self._advance(self._done, f"loss {report['loss']:.3f}{self._save}")
            case "SaveStarted":
                self._save = f"   saving step {report['step']} …"
            case "Committed":
                seconds, stall = report["durable_seconds"], report["stall_seconds"] * 1e3
                self._save = f"   step {report['step']} durable after {seconds:.2f} s, stall {stall:.1f} ms"
                self._advance(self._done, self._save.strip())


def _killed_run(show: Show, place: Place, steps: int, every: int) -> tuple[list[Report], int]:
    """Train until a save is in flight, and kill the process there, which the directory proves. Return the process's
    reports, and the step that was being saved.

    Raises ``ChildFailed`` where no attempt hits a save.
    """
    show.heading(f"Run 2: the same, saved every {every} steps, and killed with SIGKILL while a save is in flight")
    for attempt in range(_KILL_ATTEMPTS):
        victim = (3 + attempt) * every
        arguments: list[str | Path] = ["--run", place.interrupted, "--corpus", place.corpus, "--steps", str(steps)]

        def is_writing(report: Report, victim: int = victim) -> bool:
            return bool(report["kind"] == "ExtentWritten" and report["step"] == victim)

        with show.progress("training", steps) as advance:
            reports, code = follow(
                "asyncckpt.demo.train",
                [*arguments, "--every", str(every)],
                place.log,
                _Watcher(advance),
                kill_when=is_writing,
            )
        visible = [entry.step for entry in Run(place.interrupted).ls()]
        torn = [name for name in _attempts(place.interrupted) if f"-{victim}-" in name or f"-{victim:08d}-" in name]
        if victim not in visible and torn:
            show.fact(f"killed (exit code {code}) while step {victim} was being written", good=True)
            show.fact(f"left behind, invisible to every reader: {torn[0]}", good=True)
            show.fact(f"visible: steps {', '.join(map(str, visible))}; step {victim} is not among them", good=True)
            return reports, victim
        show.fact(f"step {victim} was durable before the signal came; the next save is tried")
    raise ChildFailed("no save was hit by SIGKILL: this disk is too fast for the demo; try again")


def _attempts(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob(".tmp-*"))


def _compare(show: Show, place: Place, steps: int, reference: Sequence[Report], other: Sequence[Report]) -> bool:
    show.heading("Bit for bit: run 1 against runs 2 and 3")
    table = Table("component", "values", "bytes", "equal", box=None, padding=(0, 2, 0, 4))
    comparisons = compare(place.uninterrupted, place.interrupted, steps, place.corpus, steps)
    for one in comparisons:
        verdict = "[green]every bit[/]" if not one.different else f"[red]no: {_shown(one)}[/]"
        table.add_row(one.component, f"{one.values:,}", f"{one.nbytes:,}", verdict)
    expected = {report["step"]: report["loss"] for report in reference if report["kind"] == "Step"}
    wrong: list[int] = [r["step"] for r in other if r["kind"] == "Step" and expected[r["step"]] != r["loss"]]
    verdict = "[green]every bit[/]" if not wrong else f"[red]no: from step {wrong[0]}[/]"
    table.add_row("losses as printed", f"{sum(r['kind'] == 'Step' for r in other):,}", "", verdict)
    show.table(table)
    equal = not wrong and all(not one.different for one in comparisons)
    if equal:
        text = (
            f"BIT-EQUAL: killed and resumed, the run ends where the uninterrupted one does, loss {expected[steps]:.4f}"
        )
        show.fact(f"[bold green]{text}[/]", good=True)
    else:
        show.fact("[bold red]NOT EQUAL: the resumed run differs from the uninterrupted one[/]", good=False)
    return equal


def _shown(one: Comparison) -> str:
    more = f" and {len(one.different) - 1} more" if len(one.different) > 1 else ""
    return f"{one.different[0]}{more}"


def _measure(show: Show, place: Place, rounds: int) -> None:
    show.heading("Against torch.save of the same state")
    place.measured.mkdir()
    with show.progress("saving in turn", rounds * 4) as advance:
        done = 0

        def count(report: Report) -> None:
            nonlocal done
            if report["kind"] == "Measured":
                done += 1
                advance(done, report["method"])

        arguments: list[str | Path] = ["--directory", place.measured, "--corpus", place.corpus]
        reports, _ = follow("asyncckpt.demo.measure", [*arguments, "--rounds", str(rounds)], place.log, count)
    shutil.rmtree(place.measured)
    measured = [report for report in reports if report["kind"] == "Measured"]
    nbytes = measured[0]["nbytes"]
    table = Table(box=None, padding=(0, 2, 0, 4))
    for column in ("", "stall", "durable after", "GB/s"):
        table.add_column(column, no_wrap=True, justify="right" if column else "left")
    for method in (measure.ASYNC, measure.ASYNC_IDLE, measure.TORCH_FSYNC, measure.TORCH):
        mine = [report for report in measured if report["method"] == method]
        stall = statistics.median(report["stall_seconds"] for report in mine)
        durable = [report["durable_seconds"] for report in mine if report["durable_seconds"] is not None]
        seconds = statistics.median(durable) if durable else None
        table.add_row(
            method,
            f"{stall * 1e3:,.1f} ms",
            "no fsync: never" if seconds is None else f"{seconds * 1e3:,.0f} ms",
            "" if seconds is None else f"{nbytes / seconds / 1e9:.2f}",
        )
    show.table(table)
    show.fact(
        f"{nbytes / 1e6:.0f} MB; medians of {rounds}, in turn; this machine, this run: `make bench` measures in earnest"
    )


def _sum_up(show: Show, place: Place, killed_step: int, start: int, steps: int, equal: bool) -> None:
    show.heading("In short")
    show.fact(f"SIGKILL during the save of step {killed_step}; resumed after step {start}; trained to step {steps}")
    show.fact("bit-equal to the uninterrupted run" if equal else "NOT bit-equal to the uninterrupted run", good=equal)
    show.fact(f"everything is in {place.root}; look at {place.picture}")
    show.fact("next:")
    run = place.quoted(place.interrupted)
    for command in (f"asyncckpt ls {run}", f"asyncckpt verify {run}"):
        show.fact(f"    [bold]{command}[/]")
