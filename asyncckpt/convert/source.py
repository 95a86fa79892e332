"""A ``Source`` is what a reader of a foreign format hands to the import: components, files beside them, and losses."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import xxhash

from asyncckpt.codecs import digests
from asyncckpt.convert.tensors import SourceTensor
from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound
from asyncckpt.types import JsonValue

#: ``progress(what, done_bytes, total_bytes)``: it may be called on any thread.
Progress = Callable[[str, int, int], None]
_PIECE_BYTES = 8 << 20


@dataclass
class SourceComponent:
    """A component as it will be in the checkpoint. ``kind``: ``module`` (``value`` maps names to ``SourceTensor``),
    ``optimizer`` (a ``state_dict`` by the names of parameters) or ``plain`` (any plain containers and values). Tensors
    in ``value`` are ``SourceTensor`` objects."""

    name: str
    kind: str
    value: Any
    #: The file of a checkpoint that its tensors have to lie in, so that another library finds them there.
    file: str = ""


@dataclass
class Source:
    """What a file or a directory of another format holds.

    ``lost`` says by name what a checkpoint cannot hold, and why; ``notes`` say in words what became of what.
    ``assets``: small files to keep with the checkpoint; ``metadata`` and ``metrics`` go into its manifest. ``checks``
    verify what the format itself can verify. ``open_file`` and ``map_file`` open files for reading, which stay open
    until ``close``; what they opened, and what ``read_by_others`` names, is what ``digests`` digests.
    """

    format: str
    path: str
    components: list[SourceComponent] = field(default_factory=list)
    assets: dict[str, bytes] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    checks: list[Callable[[Progress], None]] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    _files: dict[str, tuple[int, os.stat_result]] = field(default_factory=dict)
    _others: dict[str, os.stat_result] = field(default_factory=dict)
    _maps: dict[str, memoryview] = field(default_factory=dict)
    _closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def open_file(self, path: str) -> tuple[int, int]:
        """Return a descriptor of the file, and its size in bytes. Raises ``CheckpointNotFound`` and
        ``CheckpointDamaged`` (it is no regular file)."""
        if path not in self._files:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise CheckpointNotFound(f"{path}: no such file") from error
            except OSError as error:
                raise CheckpointDamaged(f"{path} cannot be opened ({error.strerror})") from error
            self._closing.callback(os.close, fd)
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise CheckpointDamaged(f"{path} is no regular file")
            self._files[path] = fd, info
        fd, info = self._files[path]
        return fd, info.st_size

    def map_file(self, path: str) -> memoryview:
        """Return the bytes of the file, mapped and private to this process: they are in no memory until they are read,
        and take none that the system cannot take back. Raises as ``open_file`` does."""
        if path not in self._maps:
            fd, size = self.open_file(path)
            mapped = mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) if size else b""
            self._maps[path] = memoryview(mapped)
        return self._maps[path]

    def read_small(self, path: str, limit_bytes: int = 64 << 20) -> bytes:
        """Return the content of a small file. Raises as ``open_file`` does, and ``CheckpointDamaged`` for a large
        one."""
        fd, size = self.open_file(path)
        if size > limit_bytes:
            raise CheckpointDamaged(f"{path} has {size} bytes, and no file of its kind has more than {limit_bytes}")
        return os.pread(fd, size, 0)

    def read_by_others(self, path: str, info: os.stat_result | None = None) -> None:
        """Count a file among the source's that something else opens and reads, such as a format's library. ``info``:
        what it was when that opened it; by default what it is now. Raises ``CheckpointDamaged`` where it is not
        there."""
        try:
            self._others.setdefault(path, info or os.stat(path))
        except OSError as error:
            raise CheckpointDamaged(f"{path} cannot be read ({error.strerror})") from error

    def on_close(self, call: Callable[[], None]) -> None:
        """Have ``call`` called once nothing of the source is read any more."""
        self._closing.callback(call)

    @property
    def nbytes(self) -> int:
        """The size of all files of the source, in bytes."""
        others = sum(info.st_size for path, info in self._others.items() if path not in self._files)
        return others + sum(info.st_size for _, info in self._files.values())

    def digests(self, algorithm: str, progress: Progress) -> dict[str, dict[str, int | str]]:
        """Return ``{name: {"nbytes": …, algorithm: hex digest}}`` of the source's files; the names are those below
        its directory. Blocks: it reads all of them. Raises ``CheckpointDamaged`` where one became shorter."""
        folder = self.path if os.path.isdir(self.path) else os.path.dirname(self.path)
        found: dict[str, dict[str, int | str]] = {}
        done, total = 0, self.nbytes

        def of(path: str, fd: int, nbytes: int) -> None:
            nonlocal done
            digest: Any = hashlib.sha256() if algorithm == "sha256" else xxhash.xxh3_128()
            buffer = memoryview(bytearray(min(_PIECE_BYTES, max(1, nbytes))))
            at = 0
            while at < nbytes:
                got = os.preadv(fd, [buffer], at)
                if not got:
                    raise CheckpointDamaged(f"{path} became shorter while it was read")
                digest.update(buffer[:got])
                at, done = at + got, done + got
                progress("reading the source", done, total)
            found[os.path.relpath(path, folder or ".")] = {"nbytes": nbytes, algorithm: digest.hexdigest()}

        for path, info in self._others.items():
            if path in self._files:
                continue
            try:
                with open(path, "rb") as file:
                    of(path, file.fileno(), info.st_size)
            except OSError as error:
                raise CheckpointDamaged(f"{path} cannot be read any more ({error.strerror})") from error
        for path, (fd, info) in self._files.items():
            of(path, fd, info.st_size)
        return found

    def record(self, digest: str, progress: Progress, dropped: Iterable[str]) -> dict[str, JsonValue]:
        """Verify what the format can verify, digest the files, and return what a checkpoint records of the source.
        ``digest``: the algorithm of the checkpoint; with sha256 the files get that, too, for others to compare.
        ``dropped``: what was left behind. Blocks: it reads all of them. Raises ``CheckpointDamaged``."""
        for check in self.checks:
            check(progress)
        files = self.digests("sha256" if digest == "sha256" else digests.DEFAULT, progress)
        left = list(dropped)
        return {
            "format": self.format,
            "path": os.path.abspath(self.path),
            "files": {name: dict(one) for name, one in files.items()},
            **({"metadata": dict(self.metadata)} if self.metadata else {}),
            **({"dropped": [*left]} if left else {}),
        }

    def check_unchanged(self) -> None:
        """Raise ``CheckpointDamaged`` where a file is another one than when it was opened."""
        now = {path: os.fstat(fd) for path, (fd, _) in self._files.items()}
        before = {path: info for path, (_, info) in self._files.items()}
        for path, info in self._others.items():
            try:
                now[path] = os.stat(path)
            except OSError as error:
                raise CheckpointDamaged(f"{path} is gone since it was read ({error.strerror})") from error
            before[path] = info
        for path, info in before.items():
            if _identity(info) != _identity(now[path]):
                raise CheckpointDamaged(f"{path} changed while it was read; import it once nobody writes it any more")

    def close(self) -> None:
        """Close all files. Idempotent."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _identity(info: os.stat_result) -> tuple[int, ...]:
    """Return what changes where a file is written to, or another one takes its place."""
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def module(name: str, tensors: Mapping[str, SourceTensor]) -> SourceComponent:
    """Return the component of a module with these tensors by name."""
    return SourceComponent(name, "module", dict(tensors))
