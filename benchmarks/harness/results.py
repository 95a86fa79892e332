"""``Result`` holds one run of one suite; a recorded one is a JSON file, from which its tables are printed.

A file has ``version`` (of this format), ``suite``, ``command``, ``environment`` (enough to compare results, and nothing
that names the machine), ``tables`` (each a ``title``, a ``head`` and ``rows`` of text), ``footer``, and ``data``: every
figure that was measured, in seconds and bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

VERSION = 1
#: Recorded results are kept here, in the repository.
FOLDER = Path(__file__).resolve().parents[1] / "results"

Cells: TypeAlias = Sequence[str]


@dataclass(frozen=True, slots=True)
class Table:
    """A table as it is shown: text in cells."""

    title: str
    head: Cells
    rows: Sequence[Cells]


@dataclass(frozen=True, slots=True)
class Result:
    """Holds what one run of one suite measured. ``data`` must be JSON values."""

    suite: str
    command: str
    environment: Mapping[str, str | int]
    tables: Sequence[Table]
    footer: str
    data: Mapping[str, Any]

    def markdown(self) -> str:
        """Format the tables for a page, with the command that made them."""
        parts = [_markdown(table) for table in self.tables]
        return "\n\n".join([*parts, f"`{self.command}`: {self.footer}"]) + "\n"

    def json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"


def record(result: Result, folder: Path = FOLDER) -> Path:
    """Write the result into a new file ``<date>-<suite>.json``, which a further run of that day follows as ``-2``, and
    return its path. Raises ``OSError``."""
    folder.mkdir(parents=True, exist_ok=True)
    name, number = f"{result.environment['date']}-{result.suite}", 1
    while True:
        path = folder / (f"{name}.json" if number == 1 else f"{name}-{number}.json")
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(result.json())
            return path
        except FileExistsError:
            number += 1


def load(path: Path) -> Result:
    """Read a recorded result. Raises ``OSError``, and ``ValueError`` for anything but such a file."""
    body = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(body, dict) or body.pop("version", None) != VERSION:
        raise ValueError(f"{path} is not a result of version {VERSION}")
    try:
        return Result(**{**body, "tables": [Table(**table) for table in body["tables"]]})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result: {error}") from error


def _markdown(table: Table) -> str:
    lines = [_pipe(table.head), _pipe(["---"] * len(table.head)), *(_pipe(row) for row in table.rows)]
    return "\n".join([f"**{table.title}**", "", *lines])


def _pipe(cells: Cells) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
