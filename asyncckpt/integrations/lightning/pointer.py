"""A pointer is the small text file that stands where Lightning expects a ``.ckpt`` file. It says which checkpoint of
which run is meant, so ``torch.load`` refuses it at once, and nothing is ever read in part."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from asyncckpt.errors import RunPathError
from asyncckpt.integrations.whole_files import write_whole

_BEGINNING: Final = b'{"asyncckpt-pointer": '
_VERSION: Final = 1
_MOST_BYTES: Final = 4096
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
        fields = {"asyncckpt-pointer": _VERSION, "run": self.run, "name": self.name, "about": _ABOUT}
        return (json.dumps(fields) + "\n").encode()


def read_pointer(path: Path) -> Pointer | None:
    """Return the pointer that this file is, whatever links lead to it; None for any other file, for a directory, and
    where there is nothing. Raises ``RunPathError`` for a pointer that is damaged, or of a version that is unknown."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    if not data.startswith(_BEGINNING):
        return None
    try:
        fields = json.loads(data)
        version, run, name = fields["asyncckpt-pointer"], fields["run"], fields["name"]
    except (ValueError, KeyError) as error:
        raise RunPathError(f"{path}: this pointer to a checkpoint is damaged; look for its run beside it") from error
    if version != _VERSION or type(name) is not str or type(run) is not str or run != os.path.basename(run):
        raise RunPathError(f"{path}: this pointer to a checkpoint is of another version; update asyncckpt")
    return Pointer(run, name)


def write_pointer(path: Path, pointer: Pointer, *, durable: bool) -> None:
    """Put the pointer where ``path`` says, in the place of what is there; ``durable``: so that it survives a power
    loss, too. The file appears whole or not at all. Raises ``RunPathError`` where that is a directory."""
    if path.is_dir() and not path.is_symlink():
        raise RunPathError(f"{path}: this is a directory, which a save does not replace; remove it, or save elsewhere")
    write_whole(path, lambda file: file.write(pointer.text()), durable=durable)


def link_to(path: Path, target: Path) -> None:
    """Have ``path`` be a link to ``target``, a file beside it, in the place of what is there. Raises ``RunPathError``
    where that is a directory."""
    if path.is_dir() and not path.is_symlink():
        raise RunPathError(f"{path}: this is a directory, which a save does not replace; remove it, or save elsewhere")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.replace(path)
