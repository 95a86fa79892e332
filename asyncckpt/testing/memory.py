"""This file system in memory does what recovery needs: it lets what is there be read, moved and deleted."""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterable, Mapping

from asyncckpt.storage.posix import PosixOps
from asyncckpt.types import Buffer


class _Node:
    __slots__ = ("data", "entries", "number")

    def __init__(self, number: int, data: bytes | None) -> None:
        self.number = number
        self.data = data
        self.entries: dict[str, _Node] = {}


class MemoryOps(PosixOps):
    """Holds ``items``: paths, parents first, and each file's bytes, or None for a directory. Not thread-safe for
    changes."""

    def __init__(self, items: Iterable[tuple[str, bytes | None]]) -> None:
        self._numbers = itertools.count(1)
        self._root = _Node(0, None)
        self._open: dict[int, _Node] = {}
        # the kernel never gives out descriptors this high, so one of its own is not mistaken for one of these
        self._fds = itertools.count(1 << 20)
        for path, data in items:
            folder, name = self._parent(path)
            folder.entries[name] = _Node(next(self._numbers), data)

    def _parent(self, path: str, start: _Node | None = None) -> tuple[_Node, str]:
        node = start or self._root
        *folders, name = path.strip("/").split("/")
        for part in folders:
            node = self._child(node, part)
        return node, name

    def _child(self, node: _Node, name: str) -> _Node:
        if node.data is not None:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
        try:
            return node.entries[name]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from None

    def _node(self, path: str, folder: int | None = None) -> _Node:
        parent, name = self._parent(path, None if folder is None else self._open[folder])
        return self._child(parent, name)

    def open_to_read(self, path: str, flags: int, folder: int | None = None) -> int:
        node = self._node(path, folder)
        if flags & os.O_DIRECTORY and node.data is not None:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        fd = next(self._fds)
        self._open[fd] = node
        return fd

    def close_read(self, fd: int) -> None:
        del self._open[fd]

    def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
        return (self._open[fd].data or b"")[offset : offset + nbytes]

    def preadv(self, fd: int, buffer: Buffer, offset: int) -> int:
        data = self._open[fd].data or b""
        part = data[offset : offset + memoryview(buffer).nbytes]
        memoryview(buffer)[: len(part)] = part
        return len(part)

    def stat(self, fd: int) -> os.stat_result:
        return _stat(self._open[fd])

    def lstat(self, path: str, folder: int | None = None) -> os.stat_result:
        return _stat(self._node(path, folder))

    def names(self, folder: int) -> list[str]:
        return list(self._open[folder].entries)

    def lock(self, fd: int, operation: int) -> None:
        pass

    def scan(self, path: str) -> Mapping[str, os.stat_result]:
        node = self._node(path)
        if node.data is not None:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return {name: _stat(child) for name, child in node.entries.items()}

    def fsync_directory(self, path: str) -> None:
        self._node(path)

    def unlink(self, path: str) -> None:
        self._node(path)
        folder, name = self._parent(path)
        del folder.entries[name]

    def rmdir(self, path: str) -> None:
        if self._node(path).entries:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        self.unlink(path)

    def rename_noreplace(self, source: str, target: str) -> None:
        node = self._node(source)
        folder, name = self._parent(target)
        if name in folder.entries:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        self.unlink(source)
        folder.entries[name] = node

    def walk(self) -> list[tuple[str, bytes | None]]:
        """Return everything there is, as the constructor takes it."""
        found: list[tuple[str, bytes | None]] = []
        pending = [("", self._root)]
        while pending:
            path, node = pending.pop()
            for name, child in sorted(node.entries.items()):
                found.append((f"{path}{name}", child.data))
                pending.append((f"{path}{name}/", child))
        return found


def _stat(node: _Node) -> os.stat_result:
    kind = stat.S_IFDIR | 0o755 if node.data is None else stat.S_IFREG | 0o644
    return os.stat_result((kind, node.number, 0, 1, 0, 0, len(node.data or b""), 0, 0, 0))
