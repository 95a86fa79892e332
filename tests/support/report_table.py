"""Tests fill this table of world size, parallelism and format; it is printed at the end of the run."""

from __future__ import annotations


class Table:
    """``equal`` means the same SHA-256 as one process writes, ``refused`` a typed error that names the way out."""

    def __init__(self) -> None:
        self._cells: dict[tuple[str, str], dict[int, str]] = {}

    def note(self, parallelism: str, form: str, size: int, word: str) -> None:
        self._cells.setdefault((parallelism, form), {})[size] = word

    def lines(self) -> list[str]:
        if not self._cells:
            return []
        sizes = sorted({size for row in self._cells.values() for size in row})
        lines = [f"{'':32}" + "".join(f"{f'{size} ranks':>10}" for size in sizes)]
        for (parallelism, form), row in self._cells.items():
            words = "".join(f"{row.get(size, '-'):>10}" for size in sizes)
            lines.append(f"{parallelism:11}{form:21}{words}")
        return lines


TABLE = Table()
