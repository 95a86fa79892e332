"""The ``asyncckpt`` command has one file a verb; each only translates between the terminal and the library."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command. It needs the ``[cli]`` extra, and says so where that is missing."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        print("the asyncckpt command needs: pip install 'asyncckpt[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    from asyncckpt.cli.app import app

    app()
