"""This block device records every write and flush, and computes what a power loss may leave of them.

The device is a loop device on a file of a FUSE file system, which a process of its own serves: whatever a file system
on it writes, and when it asks for a flush, goes through there. A disk may lose, reorder and tear everything since the
last flush that it confirmed. It needs Linux, root and libfuse; ``reason_unavailable`` says what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import mmap
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

#: A disk writes this many bytes in one go, or none of them.
PIECE_BYTES: Final = 4096
_WRITE, _FLUSH, _MARK = 0, 1, 2
_HEAD: Final = struct.Struct("<BQQ")
_PATIENCE_SECONDS: Final = 20.0
_KEPT_SHARES: Final = (0.1, 0.5, 0.9)

Image = np.ndarray[Any, np.dtype[np.uint8]]


def reason_unavailable(*programs: str) -> str | None:
    """Say why there is no such device here, or return None where there can be. ``programs`` are needed, too."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "mounting needs root on Linux"
    missing = [path for path in ("/dev/fuse", "/dev/loop-control") if not os.path.exists(path)]
    missing += [name for name in ("losetup", *programs) if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} is missing"
    from asyncckpt.testing.forgetful_fs import (
        fuse_missing,  # the server runs this file, and imports no more than it needs
    )

    return fuse_missing()


@dataclass(frozen=True, slots=True)
class Write:
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark in the log is what the workload knew at that moment."""

    text: str


class Flush:
    """At a flush, everything before it in the log is on the disk."""


Record = Write | Mark | Flush


class RecordingDevice:
    """Records while it is used as a context: ``path`` is the block device, ``mark`` notes something in the log,
    ``records`` reads it afterwards.

    ``image`` is the file that holds the disk's bytes, ``folder`` the place of the mount point and of the log. Not
    thread-safe.
    """

    def __init__(self, image: Path, folder: Path) -> None:
        self.path = ""
        self._image = image
        self._mount = folder / "device"
        self._log = folder / "log"
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._mount.mkdir()
        command = [sys.executable, "-m", "asyncckpt.testing.blockdevice", self._image, self._mount, self._log]
        with contextlib.ExitStack() as stack:
            server = subprocess.Popen([str(part) for part in command])
            stack.callback(_ended, server)
            stack.callback(_unmounted, self._mount)
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not (self._mount / "disk").exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise OSError(errno.EIO, "the recording device's server did not start", str(self._mount))
                time.sleep(0.01)
            self.path = stack.enter_context(loop_device(self._mount / "disk"))
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def mark(self, text: str) -> None:
        """Note something in the log. Blocks until it is there, behind every write that came before."""
        with open(self._mount / "mark", "wb", buffering=0) as file:
            file.write(text.encode())

    def records(self) -> list[Record]:
        """Return the whole log. Call this after the context has ended."""
        found: list[Record] = []
        with open(self._log, "rb") as file:
            while head := file.read(_HEAD.size):
                kind, offset, size = _HEAD.unpack(head)
                data = file.read(size)
                found.append(
                    Flush() if kind == _FLUSH else Mark(data.decode()) if kind == _MARK else Write(offset, data)
                )
        return found


@contextlib.contextmanager
def loop_device(file: Path) -> Iterator[str]:
    """Make a loop device (``/dev/loop…``) of a file."""
    path = subprocess.check_output(["losetup", "--find", "--show", str(file)], text=True).strip()
    try:
        yield path
    finally:
        subprocess.run(["losetup", "--detach", path], check=False)


@contextlib.contextmanager
def mounted(device: str, folder: Path, kind: str, options: str = "") -> Iterator[Path]:
    """Mount a file system. Raises ``OSError`` where the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(device.encode(), os.fsencode(folder), kind.encode(), 0, options.encode()):
        number = ctypes.get_errno()
        raise OSError(number, f"mount of {kind}: {os.strerror(number)}", str(folder))
    try:
        yield folder
    finally:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while libc.umount2(os.fsencode(folder), 0):
            number = ctypes.get_errno()
            if number != errno.EBUSY or time.monotonic() > deadline:
                libc.umount2(os.fsencode(folder), 2)  # lazily, so that nothing is left behind
                raise OSError(number, f"umount: {os.strerror(number)}", str(folder))
            time.sleep(0.01)


# -- what a power loss leaves ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Epoch:
    """Holds the writes between two flushes. ``durable`` is the number of writes before them; ``marks`` pair a text with
    the number of the epoch's writes before it."""

    durable: int
    writes: tuple[Write, ...]
    marks: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Loss:
    """Describes one power loss, after ``reached`` writes of an epoch, of which ``pieces`` are on the disk. ``known`` is
    what was marked by then."""

    kind: str
    epoch: int
    reached: int
    pieces: tuple[tuple[int, bytes], ...]
    known: tuple[str, ...]


def epochs(records: Iterable[Record]) -> list[Epoch]:
    """Cut the log at every flush."""
    found: list[Epoch] = []
    writes: list[Write] = []
    marks: list[tuple[str, int]] = []
    done = 0
    for record in records:
        if isinstance(record, Write):
            writes.append(record)
        elif isinstance(record, Mark):
            marks.append((record.text, len(writes)))
        else:
            found.append(Epoch(done, tuple(writes), tuple(marks)))
            done += len(writes)
            writes, marks = [], []
    return [*found, Epoch(done, tuple(writes), tuple(marks))]


def losses(cut: Sequence[Epoch], count: int, rng: random.Random) -> list[Loss]:
    """Choose ``count`` power losses, in the order of the log. They come before and after every flush, or at a sample of
    those that makes a third of ``count``; the rest come after a random write, with a random subset of what was written
    since, whole or in pieces of 4 KiB."""
    plain: list[Loss] = []
    known: tuple[str, ...] = ()
    earlier: list[tuple[str, ...]] = []
    for number, epoch in enumerate(cut):
        earlier.append(known)
        if epoch.writes:
            plain.append(_loss("nothing of it", number, epoch, len(epoch.writes), [], known))
            whole = [(write.offset, write.data) for write in epoch.writes]
            plain.append(_loss("all of it", number, epoch, len(epoch.writes), whole, known))
        known = (*known, *(text for text, _ in epoch.marks))
    if len(plain) > count // 3:
        plain = rng.sample(plain, count // 3)
    numbers = [number for number, epoch in enumerate(cut) if epoch.writes]
    while len(plain) < count and numbers:
        number = rng.choice(numbers)
        epoch = cut[number]
        reached = rng.randint(1, len(epoch.writes))
        torn, share = rng.random() < 0.5, rng.choice(_KEPT_SHARES)
        kept = [piece for write in epoch.writes[:reached] for piece in _pieces(write, torn) if rng.random() < share]
        if rng.random() < 0.3:  # a disk may write in another order than it was told
            rng.shuffle(kept)
        kind = "torn writes" if torn else "lost writes"
        plain.append(_loss(kind, number, epoch, reached, kept, earlier[number]))
    return sorted(plain, key=lambda loss: (loss.epoch, loss.reached))


def replay(initial: Image, cut: Sequence[Epoch], chosen: Iterable[Loss], image: Image) -> Iterator[Loss]:
    """Make ``image`` what each loss leaves, in turn. This uses ``initial`` up."""
    number = 0
    for loss in chosen:
        while number < loss.epoch:
            for write in cut[number].writes:
                _put(initial, write.offset, write.data)
            number += 1
        image[:] = initial
        for offset, data in loss.pieces:
            _put(image, offset, data)
        yield loss


def _loss(
    kind: str, number: int, epoch: Epoch, reached: int, pieces: Sequence[tuple[int, bytes]], known: tuple[str, ...]
) -> Loss:
    seen = tuple(text for text, before in epoch.marks if before <= (0 if kind == "nothing of it" else reached))
    return Loss(kind, number, reached, tuple(pieces), (*known, *seen))


def _pieces(write: Write, torn: bool) -> list[tuple[int, bytes]]:
    if not torn:
        return [(write.offset, write.data)]
    return [(write.offset + at, write.data[at : at + PIECE_BYTES]) for at in range(0, len(write.data), PIECE_BYTES)]


def _put(image: Image, offset: int, data: bytes) -> None:
    image[offset : offset + len(data)] = np.frombuffer(data, np.uint8)


# -- the server --------------------------------------------------------------------------------------------------------


def _unmounted(folder: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(folder), 0):
        libc.umount2(os.fsencode(folder), 2)


def _ended(server: subprocess.Popen[bytes]) -> None:
    try:
        server.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _serve(image: str, mount: str, log: str) -> None:
    import mfusepy

    with open(image, "r+b") as backing, open(log, "wb") as records:
        disk = mmap.mmap(backing.fileno(), 0)

        def note(kind: int, offset: int = 0, data: bytes = b"") -> None:
            records.write(_HEAD.pack(kind, offset, len(data)) + data)

        class Device(mfusepy.Operations):  # type: ignore[misc]
            use_ns = True

            def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
                if path == "/":
                    return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}
                if path not in ("/disk", "/mark"):
                    raise mfusepy.FuseOSError(errno.ENOENT)
                return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": len(disk) if path == "/disk" else 0}

            def readdir(self, path: str, fh: int) -> Sequence[str]:
                return [".", "..", "disk", "mark"]

            def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
                return disk[offset : offset + size] if path == "/disk" else b""

            def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
                if path == "/mark":
                    note(_MARK, 0, bytes(data))
                else:
                    disk[offset : offset + len(data)] = data
                    note(_WRITE, offset, bytes(data))
                return len(data)

            def truncate(self, path: str, length: int, fh: int | None = None) -> None:
                return None  # a program that opens the mark's file for writing asks for this

            def fsync(self, path: str, datasync: int, fh: int) -> None:
                note(_FLUSH)

        mfusepy.FUSE(Device(), mount, foreground=True, nothreads=True, allow_other=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m asyncckpt.testing.blockdevice", description=__doc__)
    parser.add_argument("image", help="file that holds the disk's bytes")
    parser.add_argument("mount", help="empty directory")
    parser.add_argument("log", help="file for the records")
    options = parser.parse_args(arguments)
    _serve(options.image, options.mount, options.log)


if __name__ == "__main__":
    main()
