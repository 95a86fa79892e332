"""The command's table of verbs."""

from __future__ import annotations

from typing import Annotated

import typer

from asyncckpt.cli.common import EXIT_CODES
from asyncckpt.cli.convert import convert
from asyncckpt.cli.demo import demo
from asyncckpt.cli.diff import diff
from asyncckpt.cli.doctor import doctor
from asyncckpt.cli.export import export
from asyncckpt.cli.ls import ls
from asyncckpt.cli.pin import pin, unpin
from asyncckpt.cli.prune import prune
from asyncckpt.cli.show import show
from asyncckpt.cli.verify import verify
from asyncckpt.manifest.environment import version

app = typer.Typer(
    name="asyncckpt",
    help="Look at, verify, compare, thin out and export checkpoints. Works on a run another process is writing.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version())
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None: ...


for _verb in (ls, show, verify, diff, prune, pin, unpin, export, convert, doctor, demo):
    app.command(epilog=EXIT_CODES)(_verb)
