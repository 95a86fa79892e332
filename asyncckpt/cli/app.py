"""The table of verbs makes up the command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from asyncckpt.cli.annotate import annotate
from asyncckpt.cli.average import average
from asyncckpt.cli.best import best
from asyncckpt.cli.common import EXIT_CODES, LATEST_HELP
from asyncckpt.cli.copy import copy
from asyncckpt.cli.demo import demo
from asyncckpt.cli.diff import diff
from asyncckpt.cli.doctor import doctor
from asyncckpt.cli.export import export
from asyncckpt.cli.follow import follow
from asyncckpt.cli.importing import import_
from asyncckpt.cli.ls import ls
from asyncckpt.cli.pin import pin, unpin
from asyncckpt.cli.prune import prune
from asyncckpt.cli.report import report
from asyncckpt.cli.show import show
from asyncckpt.cli.thin import thin
from asyncckpt.cli.verify import verify
from asyncckpt.manifest.environment import version

#: Panels of ``--help`` group the verbs by what a user wants, in this order.
PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Look": (ls, show, best, diff, report, follow),
    "Check": (verify, doctor),
    "Change": (pin, unpin, annotate, prune, thin),
    "Combine": (average, copy),
    "Convert": (export, import_),
    "Try it out": (demo,),
}


class _Group(TyperGroup):
    """Shows the table of verbs. A flag takes no value, so its help shows none."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))


class _Verb(TyperCommand):
    """Runs one verb. A flag takes no value, so its help shows none."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))


app = typer.Typer(
    name="asyncckpt",
    cls=_Group,
    help=f"Look at, check, thin out and convert checkpoints. Works on a run that another process is writing.\n\n"
    f"{LATEST_HELP}",
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
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def _reflowed(docstring: str | None) -> str:
    """Put each paragraph of a docstring on one line: the terminal breaks lines at its own width, not at the
    source's."""
    paragraphs = inspect.cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _without_types(params: list[Any]) -> list[Any]:
    """Take away the ``<bool>`` that the framework writes beside flags."""
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params


for _panel, _verbs in PANELS.items():
    for _verb in _verbs:
        app.command(
            _verb.__name__.rstrip("_"),  # `import` is a word of Python
            cls=_Verb,
            help=_reflowed(_verb.__doc__),
            epilog=EXIT_CODES,
            rich_help_panel=_panel,
        )(_verb)
app.command("convert", cls=_Verb, help="The old name of import.", epilog=EXIT_CODES, hidden=True)(import_)
