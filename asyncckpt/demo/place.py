"""The demo may empty the directory that it writes in, because it made everything there."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from asyncckpt.errors import RunPathError
from asyncckpt.storage import local_path

_MARKER = ".asyncckpt-demo"


class Place:
    """Names the demo's files below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.corpus = root / "corpus.txt"
        self.uninterrupted = root / "uninterrupted"
        self.interrupted = root / "interrupted"
        self.measured = root / "measured"
        self.log = root / "processes.log"
        self.picture = root / "timeline.png"
        self.trace = root / "trace.json"

    def prepare(self) -> None:
        """Make the directory, or empty it of what an earlier demo made. Raises ``RunPathError`` where it holds more."""
        local_path(self.root)  # refuses a bucket, which would become a directory of that name
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            found = {entry.name for entry in self.root.iterdir()}
        except OSError as error:
            raise RunPathError(f"{self.root} cannot be used as a directory: {error}; choose another --out") from error
        made = [self.corpus, self.uninterrupted, self.interrupted, self.measured, self.log, self.picture, self.trace]
        foreign = sorted(found - {path.name for path in made} - {_MARKER})
        if foreign or (found and _MARKER not in found):
            raise RunPathError(
                f"{self.root} holds files the demo did not make ({', '.join((foreign or sorted(found))[:3])}); nothing "
                f"was touched. Choose a new or empty directory with --out"
            )
        (self.root / _MARKER).touch()
        for path in made:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def quoted(self, path: Path) -> str:
        """Return the path as a shell takes it."""
        return shlex.quote(str(path))
