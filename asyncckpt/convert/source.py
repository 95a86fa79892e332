"""A ``Source`` is what a reader of a foreign format hands to the import: components, files beside them, and losses."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, Self

import xxhash

from asyncckpt.codecs import digests
from asyncckpt.convert.source_file import BLOCK_BYTES, SourceFile
from asyncckpt.convert.tensors import SourceTensor
from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound
from asyncckpt.types import JsonValue

#: ``progress(what, done_bytes, total_bytes)``: it may be called on any thread.
Progress = Callable[[str, int, int], None]


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
    ``assets``: small files to keep with the checkpoint; ``metadata`` and ``metrics`` go into its manifest.
    ``open_file`` and ``map_file`` open files for reading, which stay open until ``close``; what they opened, and what
    ``read_by_others`` names, is what ``digests`` digests.
    """

    format: str
    path: str
    components: list[SourceComponent] = field(default_factory=list)
    assets: dict[str, bytes] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    _files: dict[str, SourceFile] = field(default_factory=dict)
    _others: dict[str, os.stat_result] = field(default_factory=dict)
    _watching: dict[str, Callable[[int, memoryview], None]] = field(default_factory=dict)
    _maps: dict[str, memoryview] = field(default_factory=dict)
    _moved: threading.Condition = field(default_factory=threading.Condition)
    _is_read: bool = False
    _is_given_up: bool = False
    _closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def open_file(self, path: str) -> SourceFile:
        """Return the file, open. Raises ``CheckpointNotFound`` and ``CheckpointDamaged`` (it is no regular file)."""
        if path not in self._files:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise CheckpointNotFound(f"{path}: no such file") from error
            except OSError as error:
                raise CheckpointDamaged(f"{path} cannot be opened ({error.strerror})") from error
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                os.close(fd)
                raise CheckpointDamaged(f"{path} is no regular file")
            self._files[path] = SourceFile(fd, info, self._moved)
            self._closing.callback(self._files[path].close)
        return self._files[path]

    def map_file(self, path: str) -> memoryview:
        """Return the bytes of the file, mapped and private to this process: they are in no memory until they are read,
        and take none that the system cannot take back. Raises as ``open_file`` does."""
        if path not in self._maps:
            file = self.open_file(path)
            kind, how = mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
            self._maps[path] = memoryview(mmap.mmap(file.fd, file.nbytes, kind, how) if file.nbytes else b"")
        return self._maps[path]

    def read_small(self, path: str, limit_bytes: int = 64 << 20) -> bytes:
        """Return the content of a small file. Raises as ``open_file`` does, and ``CheckpointDamaged`` for a large
        one."""
        file = self.open_file(path)
        if file.nbytes > limit_bytes:
            raise CheckpointDamaged(
                f"{path} has {file.nbytes} bytes, and no file of its kind has more than {limit_bytes}"
            )
        return os.pread(file.fd, file.nbytes, 0)

    def watch(self, path: str, see: Callable[[int, memoryview], None]) -> None:
        """Have ``see(offset, piece)`` called with all bytes of an opened file, in order, when it is digested: it may
        verify what the format itself can verify, and raise ``CheckpointDamaged``."""
        self._watching[path] = see

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
        return others + sum(file.nbytes for file in self._files.values())

    def digests(self, algorithm: str, progress: Progress) -> dict[str, dict[str, int | str]]:
        """Return ``{name: {"nbytes": …, algorithm: hex digest}}`` of the source's files; the names are those below its
        directory. Blocks: it reads all of them. Where somebody goes through a file meanwhile, it follows, so that the
        file is read once for both; see ``nothing_more_is_read``. Raises ``CheckpointDamaged`` where one became shorter,
        and ``CancelledError`` after ``give_up``."""
        with contextlib.ExitStack() as stack:
            files = dict(self._files)
            for path, info in self._others.items():
                if path not in files:
                    files[path] = self._opened_now(path, info)
                    stack.callback(files[path].close)
            waiting = [_Digesting(path, file, algorithm, self._watching.get(path)) for path, file in files.items()]
            done, total = 0, self.nbytes
            found = {one.path: one for one in waiting}
            while waiting := [one for one in waiting if not one.is_done()]:
                with self._moved:
                    self._moved.wait_for(lambda: self._is_read or any(one.may_go_on() for one in waiting))
                if self._is_given_up:
                    raise CancelledError
                one = next((one for one in waiting if one.may_go_on()), waiting[0])
                done += one.go_on()
                progress("reading the source", done, total)
        folder = (self.path if os.path.isdir(self.path) else os.path.dirname(self.path)) or "."
        return {
            os.path.relpath(path, folder): {"nbytes": one.nbytes, algorithm: one.hexdigest()}
            for path, one in found.items()
        }

    def nothing_more_is_read(self) -> None:
        """Tell ``digests`` that nobody else goes through the files any more, or will."""
        with self._moved:
            self._is_read = True
            self._moved.notify_all()

    def give_up(self) -> None:
        """Have ``digests`` end, as nobody wants them any more."""
        self._is_given_up = True
        self.nothing_more_is_read()

    def _opened_now(self, path: str, info: os.stat_result) -> SourceFile:
        try:
            return SourceFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), info, self._moved)
        except OSError as error:
            raise CheckpointDamaged(f"{path} cannot be read any more ({error.strerror})") from error

    def record(self, digest: str, progress: Progress, dropped: Iterable[str]) -> dict[str, JsonValue]:
        """Digest the files, verify what the format can verify, and return what a checkpoint records of the source.
        ``digest``: the algorithm of the checkpoint; with sha256 the files get that, too, for others to compare.
        ``dropped``: what was left behind. Blocks: it reads all of them. Raises ``CheckpointDamaged``."""
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
        now = {path: os.fstat(file.fd) for path, file in self._files.items()}
        before = {path: file.info for path, file in self._files.items()}
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


class _Digesting:
    """Digests one file, a block at a time. ``see``: gets its bytes, too."""

    def __init__(
        self, path: str, file: SourceFile, algorithm: str, see: Callable[[int, memoryview], None] | None
    ) -> None:
        self.path = path
        self.nbytes = file.nbytes
        self._file = file
        self._see = see
        self._hash: Any = hashlib.sha256() if algorithm == "sha256" else xxhash.xxh3_128()
        self._at = 0

    def is_done(self) -> bool:
        return self._at >= self.nbytes

    def may_go_on(self) -> bool:
        """Whether the next block has been read already, or nobody else is going to."""
        return not self._file.expected or self._file.reached > self._at

    def go_on(self) -> int:
        """Digest the next block, and return its size. Raises ``CheckpointDamaged``."""
        wanted = min(BLOCK_BYTES, self.nbytes - self._at)
        try:
            with self._file.block(self._at // BLOCK_BYTES) as data:
                if len(data) < wanted:
                    raise CheckpointDamaged(f"{self.path} became shorter while it was read")
                if self._see is not None:
                    self._see(self._at, data)
                self._hash.update(data)
        except OSError as error:
            raise CheckpointDamaged(f"{self.path} cannot be read ({error.strerror})") from error
        self._at += wanted
        return wanted

    def hexdigest(self) -> str:
        found: str = self._hash.hexdigest()
        return found


def _identity(info: os.stat_result) -> tuple[int, ...]:
    """Return what changes where a file is written to, or another one takes its place."""
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def module(name: str, tensors: Mapping[str, SourceTensor]) -> SourceComponent:
    """Return the component of a module with these tensors by name."""
    return SourceComponent(name, "module", dict(tensors))
