"""What an export writes appears whole or not at all: it has a temporary name until everything of it is on the disk."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch

from asyncckpt.errors import AsyncCkptError, InvalidOption, NotEnoughSpace, RunPathError
from asyncckpt.storage import local_path
from asyncckpt.storage.posix import PosixOps


class Output:
    """A file, or a directory of files, under a temporary name beside ``target``. ``path`` is where to write; ``create``
    makes a file of a known size that is filled through memory."""

    def __init__(self, target: Path, path: Path, *, folder: bool) -> None:
        self.target = target
        self.path = path
        self._folder = folder
        self._maps: list[tuple[mmap.mmap, int]] = []
        self.beside_target: list[tuple[Path, Path]] = []

    def inside(self, name: str) -> Path:
        """Return where the file ``name`` is written to: the file itself, or one below the directory."""
        if not self._folder:
            return self.path
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def beside(self, ending: str) -> Path:
        """Return where to write a file that will be called as the target with this ending, and has its name before the
        target has."""
        path = self.path.with_name(self.path.name + ending)
        self.beside_target.append((path, self.target.with_name(self.target.name + ending)))
        return path

    def create(self, name: str, nbytes: int) -> torch.Tensor:
        """Create a file of so many bytes, and return them, as a tensor of ``uint8`` that lies in the file: what is
        written to it is the file's. The space is taken at once. Raises ``NotEnoughSpace``."""
        return self.mapped(self.inside(name), nbytes)

    def mapped(self, path: Path, nbytes: int) -> torch.Tensor:
        """Return the bytes of a file that is there, or is made, as ``create`` does."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not nbytes:
                return torch.empty(0, dtype=torch.uint8)
            os.posix_fallocate(fd, 0, nbytes)  # or a write into memory would end the process where the disk is full
            memory = mmap.mmap(fd, nbytes, mmap.MAP_SHARED)
        finally:
            os.close(fd)
        self._maps.append((memory, nbytes))
        return torch.frombuffer(memory, dtype=torch.uint8)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self.inside(name).write_bytes(data)

    def _nbytes(self) -> int:
        if not self._folder:
            return self.path.stat().st_size
        return sum(
            os.stat(os.path.join(where, file)).st_size for where, _, files in os.walk(self.path) for file in files
        )

    def publish(self, *, overwrite: bool) -> int:
        """Have everything on the disk, then give it its name; return its size in bytes."""
        ops = PosixOps()
        self._maps.clear()
        if self._folder:
            for where, _, files in os.walk(self.path, topdown=False):
                for file in files:
                    _sync(os.path.join(where, file))
                ops.fsync_directory(where)
        else:
            _sync(str(self.path))
        nbytes = self._nbytes()
        for path, name in self.beside_target:
            if path.exists():
                _sync(str(path))
                nbytes += path.stat().st_size
                (ops.replace if overwrite else ops.rename_noreplace)(str(path), str(name))
        if overwrite and not self._folder:
            ops.replace(str(self.path), str(self.target))
        else:
            ops.rename_noreplace(str(self.path), str(self.target))
        ops.fsync_directory(str(self.target.parent))
        return nbytes


def _sync(path: str) -> None:
    with open(path, "rb") as opened:
        os.fsync(opened.fileno())


@contextlib.contextmanager
def output(out: str | os.PathLike[str], *, folder: bool, overwrite: bool) -> Iterator[Output]:
    """Make a temporary file or directory beside ``out``, for the caller to fill and publish; what was not published is
    gone afterwards.

    Raises ``RunPathError`` where ``out`` exists (``overwrite`` replaces a file), its directory does not, or the storage
    refuses, and ``NotEnoughSpace``."""
    target = Path(local_path(out))
    if not target.parent.is_dir():
        raise RunPathError(f"{target}: the directory {target.parent} does not exist; create it, or choose another path")
    if folder and overwrite and target.is_dir():
        raise InvalidOption(
            f"{target}: only a file is replaced (--force); remove the directory, or choose another name"
        )
    if target.is_dir() or (os.path.lexists(target) and not (overwrite and not folder)):
        raise _exists(target, folder)
    temp = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    made: Output | None = None
    try:
        if folder:
            temp.mkdir()
        else:
            temp.touch()
        made = Output(target, temp, folder=folder)
        yield made
    except BaseException as error:
        raise_typed = _typed(error, target, folder)
        if raise_typed is None:
            raise
        raise raise_typed from error
    finally:
        with contextlib.suppress(OSError):
            if folder:
                shutil.rmtree(temp, ignore_errors=True)
            else:
                temp.unlink()
        for path, _ in made.beside_target if made is not None else ():
            with contextlib.suppress(OSError):
                path.unlink()


def _typed(error: BaseException, target: Path, folder: bool) -> AsyncCkptError | None:
    if isinstance(error, AsyncCkptError) or not isinstance(error, OSError):
        return None
    if isinstance(error, FileExistsError):
        return _exists(target, folder)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NotEnoughSpace(f"{target}: the disk is full ({error.strerror}); free space, or choose another disk")
    return RunPathError(f"{target}: cannot write here ({error}); choose another path")


def _exists(target: Path, folder: bool) -> RunPathError:
    way_out = "choose another name" if folder else "choose another name, or overwrite it on purpose (--force)"
    return RunPathError(f"{target} exists; {way_out}")
