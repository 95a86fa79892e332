"""This file system in memory forgets, at a power cut, everything that was not fsynced: bytes of files, and names in
directories. It promises nothing beyond POSIX: an fsync of a file does not cover its name, and a rename is not durable
until its directory is synced.

``ForgetfulFS`` mounts one, which a process of its own serves through FUSE. That process runs this file too, which
imports nothing of the package, so that it starts at once.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import itertools
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

_RENAME_NOREPLACE = 1
_PATIENCE_SECONDS = 20.0


def reason_unavailable() -> str | None:
    """Say why nothing can be mounted here, or return None where it can be."""
    if sys.platform != "linux" or not os.path.exists("/dev/fuse") or shutil.which("fusermount3") is None:
        return "needs FUSE on Linux"
    return fuse_missing()


def fuse_missing() -> str | None:
    """Say which library for FUSE is missing, or return None where none is."""
    if importlib.util.find_spec("mfusepy") is None:
        return "mfusepy is missing"
    try:
        importlib.import_module("mfusepy")
    except OSError as error:  # the import loads libfuse
        return f"libfuse: {error}"
    return None


class ForgetfulFS:
    """Mounts the file system at ``path`` while it is used as a context. ``cut`` and ``remains`` block until done.

    ``stop`` freezes the server: whoever touches the file system from then on hangs in the kernel until ``go_on``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)

    def __enter__(self) -> Self:
        os.makedirs(self.path, exist_ok=True)
        command = [sys.executable, __file__, self.path]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self._answer()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.go_on()
        subprocess.run(["fusermount3", "-u", "-z", self.path], capture_output=True, check=False, timeout=30)
        self._server.kill()
        self._server.wait(_PATIENCE_SECONDS)
        for pipe in (self._server.stdin, self._server.stdout):
            if pipe is not None:
                pipe.close()

    def cut(self) -> None:
        """Cut the power and bring it back: only what was fsynced is there then. Whoever had files open must be dead."""
        self._ask("cut")

    def remains(self, target: str | os.PathLike[str]) -> None:
        """Write what a power cut at this moment would leave into the new directory ``target``. Nothing is cut."""
        self._ask(f"remains {os.fspath(target)}")

    def stop(self) -> None:
        self._server.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._server.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        self._server.send_signal(signal.SIGCONT)

    def _ask(self, command: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(f"{command}\n".encode())
        self._server.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self._server.stdout is not None
        answer = self._server.stdout.readline()
        if answer != b"done\n":
            raise RuntimeError(f"the file system's server failed: {answer!r}")


# -- the server --------------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Node:
    """A node is a file or a directory: what it is, and what a power cut would leave of it."""

    number: int
    mode: int
    data: bytearray = field(default_factory=bytearray)
    durable_data: bytes = b""
    entries: dict[str, Node] = field(default_factory=dict)
    durable_entries: dict[str, Node] = field(default_factory=dict)
    links: int = 1

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)


class Tree:
    """Holds the files. Every method but the last two is one system call. Not thread-safe by itself."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.root = self._make(stat.S_IFDIR | 0o755)

    def _make(self, mode: int) -> Node:
        return Node(next(self._numbers), mode)

    def find(self, path: str) -> Node:
        node = self.root
        for name in path.split("/"):
            if name:
                if name not in node.entries:
                    raise OSError(errno.ENOENT, path)
                node = node.entries[name]
        return node

    def parent(self, path: str) -> tuple[Node, str]:
        folder, _, name = path.rpartition("/")
        return self.find(folder), name

    def add(self, path: str, mode: int) -> Node:
        folder, name = self.parent(path)
        if name in folder.entries:
            raise OSError(errno.EEXIST, path)
        folder.entries[name] = node = self._make(mode)
        return node

    def link(self, path: str, source: str) -> None:
        node = self.find(source)
        folder, name = self.parent(path)
        if name in folder.entries:
            raise OSError(errno.EEXIST, path)
        folder.entries[name] = node
        node.links += 1

    def remove(self, path: str) -> None:
        folder, name = self.parent(path)
        node = self.find(path)
        if node.entries:
            raise OSError(errno.ENOTEMPTY, path)
        node.links -= 1
        del folder.entries[name]

    def rename(self, old: str, new: str, flags: int) -> None:
        if flags & ~_RENAME_NOREPLACE:
            raise OSError(errno.EINVAL, new)
        (source, name), (target, new_name) = self.parent(old), self.parent(new)
        node = self.find(old)
        there = target.entries.get(new_name)
        if there is not None and flags & _RENAME_NOREPLACE:
            raise OSError(errno.EEXIST, new)
        if there is not None and there.entries:
            raise OSError(errno.ENOTEMPTY, new)
        del source.entries[name]
        target.entries[new_name] = node

    def write(self, node: Node, data: bytes, offset: int) -> None:
        if len(node.data) < offset:
            node.data.extend(bytes(offset - len(node.data)))
        node.data[offset : offset + len(data)] = data

    def truncate(self, node: Node, nbytes: int) -> None:
        del node.data[nbytes:]
        node.data.extend(bytes(nbytes - len(node.data)))

    def sync(self, node: Node) -> None:
        if node.is_folder:
            node.durable_entries = dict(node.entries)
        else:
            node.durable_data = bytes(node.data)

    def cut(self) -> None:
        """Forget what was not synced."""
        self.root.links = 1
        for node in self._durable(self.root):
            node.data = bytearray(node.durable_data)
            node.entries = dict(node.durable_entries)
            for child in node.entries.values():
                child.links = 0
        for node in self._durable(self.root):
            for child in node.entries.values():
                child.links += 1  # the kernel makes no further name for a file that has none

    def _durable(self, node: Node) -> Iterator[Node]:
        yield node
        for child in node.durable_entries.values():
            yield from self._durable(child)

    def remains(self, target: str, node: Node | None = None) -> None:
        """Write what ``cut`` would leave into a directory of another file system."""
        os.mkdir(target)
        for name, child in (node or self.root).durable_entries.items():
            path = os.path.join(target, name)
            if child.is_folder:
                self.remains(path, child)
            else:
                with open(path, "xb") as file:
                    file.write(child.durable_data)


def _serve(mount: str) -> None:
    mfusepy: Any = importlib.import_module("mfusepy")
    tree, lock = Tree(), threading.Lock()
    handles: dict[int, Node] = {}
    numbers = itertools.count(1)

    def opened(node: Node) -> int:
        handles[number := next(numbers)] = node
        return number

    class Operations(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def init(self, path: str) -> None:
            print("done", flush=True)  # tells the parent that it is mounted

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            with lock:
                node = handles[fh] if fh else tree.find(path)
                size = len(node.data)
                return {
                    "st_mode": node.mode,
                    "st_ino": node.number,
                    "st_nlink": max(node.links, 0),
                    "st_size": size,
                    "st_blocks": -(-size // 512),
                    "st_uid": os.getuid(),
                    "st_gid": os.getgid(),
                }

        def readdir(self, path: str, fh: int) -> list[tuple[str, dict[str, Any], int]]:
            with lock:
                folder = tree.find(path)
                nodes = {".": folder, "..": folder, **folder.entries}
                # the C library leaves out an entry that has no inode number
                return [(name, {"st_ino": one.number, "st_mode": one.mode}, 0) for name, one in nodes.items()]

        def opendir(self, path: str) -> int:
            return 0

        def create(self, path: str, mode: int, fi: Any = None) -> int:
            with lock:
                return opened(tree.add(path, stat.S_IFREG | stat.S_IMODE(mode)))

        def open(self, path: str, flags: int) -> int:
            with lock:
                return opened(tree.find(path))

        def release(self, path: str, fh: int) -> int:
            with lock:
                handles.pop(fh, None)
            return 0

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            with lock:
                return bytes(handles[fh].data[offset : offset + size])

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            with lock:
                tree.write(handles[fh], data, offset)
            return len(data)

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            with lock:
                tree.truncate(handles[fh] if fh else tree.find(path), length)
            return 0

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            with lock:
                tree.sync(handles[fh])
            return 0

        def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
            with lock:
                tree.sync(tree.find(path))
            return 0

        def mkdir(self, path: str, mode: int) -> int:
            with lock:
                tree.add(path, stat.S_IFDIR | stat.S_IMODE(mode))
            return 0

        def unlink(self, path: str) -> int:
            with lock:
                tree.remove(path)
            return 0

        def rmdir(self, path: str) -> int:
            return self.unlink(path)

        def link(self, target: str, source: str) -> int:
            with lock:
                tree.link(target, source)
            return 0

        def rename_with_flags(self, old: str, new: str, flags: int) -> int:
            with lock:
                tree.rename(old, new, flags)
            return 0

        def rename(self, old: str, new: str) -> int:
            return self.rename_with_flags(old, new, 0)

        def statfs(self, path: str) -> dict[str, int]:
            return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": 1 << 20, "f_bfree": 1 << 20, "f_bavail": 1 << 20}

    class WithFlags(mfusepy.FUSE):  # type: ignore[misc]
        def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> int:
            answer: int = self.operations.rename_with_flags(os.fsdecode(old), os.fsdecode(new), flags)
            return answer

    def obey() -> None:
        for line in sys.stdin:
            command, _, argument = line.rstrip("\n").partition(" ")
            with lock:
                tree.cut() if command == "cut" else tree.remains(argument)
            print("done", flush=True)
        os._exit(0)  # the test has died

    threading.Thread(target=obey, daemon=True).start()
    # nothing that the kernel keeps in memory may survive a cut
    uncached = {"direct_io": True, "attr_timeout": 0, "entry_timeout": 0, "negative_timeout": 0, "use_ino": True}
    WithFlags(Operations(), mount, foreground=True, nothreads=True, hard_remove=True, **uncached)


if __name__ == "__main__":
    _serve(sys.argv[1])
