"""The doctor works in a directory of its own below the one it examines. What a killed doctor leaves is deleted by the
next one, or by the next run that holds the directory."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import uuid
from types import TracebackType
from typing import Self

from asyncckpt.doctor.ops import DoctorOps
from asyncckpt.errors import RunLocked
from asyncckpt.storage.local import TEMP_PREFIX, LocalStore

PREFIX = f"{TEMP_PREFIX}doctor-"
_OURS = re.compile(rf"{re.escape(PREFIX)}[0-9a-f]{{32}}")
#: A doctor that has made its directory takes the lock in it sooner than this.
_YOUNG_SECONDS = 60.0
_LOCK = "in-use"


class Scratch:
    """``with Scratch(path, ops) as scratch: scratch.file("name")`` makes a directory, and deletes it on leaving,
    whatever happened inside; ``left_behind`` says whether that failed. Raises ``OSError`` where nothing can be made."""

    def __init__(self, path: str, ops: DoctorOps) -> None:
        self.ops = ops
        self.path = os.path.join(path, f"{PREFIX}{uuid.uuid4().hex}")
        self.left_behind = False
        self._store = LocalStore(path, ops=ops)
        self._lock = -1

    def __enter__(self) -> Self:
        try:
            self.ops.mkdir(self.path)
            # The lock says that this directory is in use; where there are no locks, a doctor deletes no directory of
            # another. It is on a file, because the stand-in for renames that replace nothing waits for a lock on the
            # directory.
            self._lock = os.open(self.file(_LOCK), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with contextlib.suppress(OSError):
                self.ops.lock_whole(self._lock)
            self._reclaim(os.path.dirname(self.path))
        except BaseException:
            self._delete()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._delete()

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def check_kept(self) -> None:
        """Raise ``RunLocked`` where somebody deleted the directory: a run that begins here clears what it finds."""
        if not self.ops.exists(self.path):
            raise RunLocked(
                f"{os.path.dirname(self.path)}: a run began here and cleared the doctor's files. "
                f"Run the doctor again when it has ended, or on another directory of the file system"
            )

    def _delete(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)  # closed first, as NFS keeps deleted files that are open, and the directory with them
            self._lock = -1
        try:
            self._store.delete_tree(self.path)
        except BaseException:  # Ctrl-C came between two files
            self._store.delete_tree(self.path)
            raise
        self.left_behind = self.ops.exists(self.path)

    def _reclaim(self, folder: str) -> None:
        """Delete what killed doctors left."""
        entries = self.ops.scan(folder)
        # both times come from the file system's clock
        now = self.ops.lstat(self.path).st_mtime
        for name, info in entries.items():
            old = os.path.join(folder, name)
            ours = _OURS.fullmatch(name) is not None and stat.S_ISDIR(info.st_mode)
            if ours and now - info.st_mtime > _YOUNG_SECONDS and self._abandoned(old):
                self._store.delete_tree(old)

    def _abandoned(self, path: str) -> bool:
        try:
            fd = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        try:
            self.ops.lock_whole(fd)
            return True
        except OSError:
            return False
        finally:
            os.close(fd)
