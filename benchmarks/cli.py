"""The command line of the benchmarks."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import peers
from benchmarks.harness import environment, report, results, runner
from benchmarks.harness.results import Result
from benchmarks.harness.state import SIZES
from benchmarks.suites import average
from benchmarks.suites.codecs import command, whole_saves
from benchmarks.suites.gpu import command as gpu_command
from benchmarks.suites.light import command as light_command
from benchmarks.suites.ranks import command as ranks_command
from benchmarks.suites.scale import command as scale_command
from benchmarks.suites.trainers import command as trainers_command

_EPILOG = "`python -m benchmarks tables FILE...` prints the tables of recorded results, as Markdown."
app = typer.Typer(add_completion=False, help="Measure the engine against the device and against its peers.")
tables_app = typer.Typer(add_completion=False)

_PIPE_COLUMNS = 200


class Suite(StrEnum):
    engine = "engine"
    peers = "peers"
    restore = "restore"
    drag = "drag"
    codecs = "codecs"
    ranks = "ranks"
    light = "light"
    average = "average"
    scale = "scale"
    trainers = "trainers"
    gpu = "gpu"


def _console() -> Console:
    """On a pipe rich takes 80 columns, in which these tables cannot be read."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_COLUMNS)


def _codecs(directory: Path, rounds: int, out: Path | None, as_json: bool) -> Result:
    progress = Console(stderr=True)
    extra = whole_saves.rows(directory, rounds, lambda name: progress.print(f"whole saves: {name}"))
    return command.run(directory, rounds, out, as_json, extra, _console())


@app.command(epilog=_EPILOG)
def bench(
    suite: Annotated[
        Suite,
        typer.Argument(help="engine, codecs, ranks, light, scale, average, trainers, gpu: their bars; else a part"),
    ] = Suite.engine,
    rounds: Annotated[int, typer.Option(min=1, help="fresh processes a peer, by turns")] = 3,
    size: Annotated[str, typer.Option(help=f"the state: {', '.join(SIZES)}")] = "gpt2",
    only: Annotated[str, typer.Option("--peers", help="comma-separated, of gpu semicolons; all when not given")] = "",
    directory: Annotated[str | None, typer.Option(help="where to write, on the file system to measure")] = None,
    out: Annotated[str | None, typer.Option(help="folder for results.json and figures.md")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the results as JSON instead of tables")] = False,
    record: Annotated[bool, typer.Option("--record", help="keep the results in benchmarks/results, too")] = False,
) -> None:
    """Measure. Progress goes to stderr; exits with 1 when a job failed, with 2 on a wrong option.

    The state, one checkpoint or two of it, and a raw file are on disk at a time: 6 GB for gpt2, and as much memory.
    """
    if suite is Suite.gpu:  # its contenders have commas in their names
        chosen = [name.strip() for name in only.split(";") if name.strip()]
        folder = Path(out) if out is not None else None
        at = Path(directory or tempfile.gettempdir())
        _keep(gpu_command.run(at, rounds, folder, as_json, _console(), chosen), record)
        return
    names = [name for name in only.split(",") if name] or list(peers.NAMES)
    for name in names:
        if name not in peers.NAMES:
            raise typer.BadParameter(f"unknown peer {name!r}; known are {', '.join(peers.NAMES)}")
    if size not in SIZES:
        raise typer.BadParameter(f"unknown size {size!r}; known are {', '.join(SIZES)}")
    target = directory or tempfile.gettempdir()
    folder = Path(out) if out is not None else None
    if suite is Suite.codecs:
        _keep(_codecs(Path(target), rounds, folder, as_json), record)
        return
    if suite is Suite.ranks:
        _keep(ranks_command.run(Path(target), rounds, size, folder, as_json, _console()), record)
        return
    if suite is Suite.average:
        _keep(average.run(Path(target), rounds, size, folder, as_json, _console()), record)
        return
    if suite is Suite.scale:
        ranks = (2,) if size == "small" else scale_command.SIZES
        _keep(scale_command.run(Path(target), rounds, folder, as_json, _console(), ranks), record)
        return
    if suite is Suite.light:
        measured = light_command.QUICK_JOBS if size == "small" else light_command.JOBS
        _keep(light_command.run(Path(target), rounds, folder, as_json, _console(), measured), record)
        return
    if suite is Suite.trainers:
        sizes = trainers_command.QUICK if size == "small" else trainers_command.FULL
        _keep(trainers_command.run(Path(target), rounds, folder, as_json, _console(), sizes), record)
        return
    described = environment.describe(target)
    progress = Console(stderr=True)
    if described["filesystem"] == "tmpfs":
        progress.print("[yellow]this is a RAM disk: choose a folder on a real one with --directory[/yellow]")
    jobs = runner.plan(suite.value, names, rounds)
    runs = runner.run(jobs, size, target, progress)
    options = {"suite": suite.value, "rounds": rounds, "size": size, "peers": names}
    asked = f"python -m benchmarks {suite.value} --rounds {rounds} --size {size}"
    asked += f" --peers {only}" if only else ""
    result = report.result(runs, names, described, options, asked)
    if as_json:
        typer.echo(result.json(), nl=False)
    else:
        report.show(runs, names, described, _console())
    if out is not None:
        for name, content in (("results.json", result.json()), ("figures.md", result.markdown())):
            progress.print(f"wrote {report.write(out, name, content)}")
    _keep(result, record)
    if any(run.error is not None for run in runs):
        raise typer.Exit(1)


@tables_app.command()
def tables(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="results in benchmarks/results")],
) -> None:
    """Print the tables of recorded results, as Markdown. Exits with 2 for a file that is not a result."""
    for file in files:
        try:
            typer.echo(results.load(file).markdown())
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error


def _keep(result: Result, record: bool) -> None:
    if record:
        Console(stderr=True).print(f"wrote {results.record(result)}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``tables``, or else the suite that is named first. A verb for the suites would change every command that the
    documentation names."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["tables"]:
        tables_app(words[1:], prog_name="python -m benchmarks tables")
    else:
        app(words, prog_name="python -m benchmarks")
