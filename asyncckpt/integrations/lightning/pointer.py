"""A pointer is the small text file that stands where Lightning expects a ``.ckpt`` file. It says which checkpoint of
which run is meant, so ``torch.load`` refuses it at once, and nothing is ever read in part."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from asyncckpt.errors import RunPathError
from asyncckpt.integrations.name_files import name_text, read_names
from asyncckpt.integrations.whole_files import write_whole

_KIND: Final = "asyncckpt-pointer"
_ABOUT: Final = (
    "This is no torch file: it names a checkpoint of the run beside it. Open it with a Trainer that has "
    "plugins=[AsyncckptIO()], or make a torch file of it with asyncckpt.integrations.lightning.export."
)


@dataclass(frozen=True, slots=True)
class Pointer:
    """Names the checkpoint that was saved last as ``name`` in the run ``run``, a folder beside the pointer's file."""

    run: str
    name: str

    def text(self) -> bytes:
        """Return the bytes of the file."""
        return name_text(_KIND, _ABOUT, run=self.run, name=self.name)


def read_pointer(path: Path) -> Pointer | None:
    """Return the pointer that this file is, whatever links lead to it; None for any other file, for a directory, and
    where there is nothing. Raises ``RunPathError`` for a pointer that is damaged, or of a version that is unknown."""
    found = read_names(path, _KIND, ("run", "name"))
    return None if found is None else Pointer(*found)


def write_pointer(path: Path, pointer: Pointer, *, durable: bool) -> None:
    """Put the pointer where ``path`` says, in the place of what is there; ``durable``: so that it survives a power
    loss, too. The file appears whole or not at all. Raises ``RunPathError`` where that is a directory."""
    check_is_no_directory(path)
    write_whole(path, lambda file: file.write(pointer.text()), durable=durable)


def check_is_no_directory(path: Path) -> None:
    """Raise ``RunPathError`` where there is a directory, as Lightning makes one for a sharded checkpoint."""
    if path.is_dir() and not path.is_symlink():
        raise RunPathError(f"{path}: this is a directory, which a save does not replace; remove it, or save elsewhere")


def link_to(path: Path, target: Path) -> None:
    """Have ``path`` be a link to ``target``, a file beside it, in the place of what is there. Raises ``RunPathError``
    where that is a directory."""
    check_is_no_directory(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.replace(path)
