"""Lines are appended to a file beside the checkpoints. They are hints: nothing here is durable, and nothing waits."""

from __future__ import annotations

import os
import stat
from typing import Final

#: The file, and what it becomes once it is full.
JOURNAL: Final = ".asyncckpt-journal.jsonl"
JOURNAL_BEFORE: Final = ".asyncckpt-journal.1.jsonl"
#: Each of the two files takes at most so many bytes.
JOURNAL_BYTES: Final = 1 << 20

_FLAGS: Final = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def append_line(folder: str, line: bytes, *, create: bool) -> bool:
    """Append a line, without its end, to the journal of the run in ``folder``. ``create``: make the file where there is
    none, and begin a new one where it is full; only the run's writer does that. Returns False where nothing was
    written. Raises ``OSError``. These calls do not go through the store's seam: no test of a save's failures counts
    them."""
    path = os.path.join(folder, JOURNAL)
    fd = _open(path, create=create)
    if fd is None:
        return False
    try:
        size = os.fstat(fd).st_size
        if size + len(line) + 2 > JOURNAL_BYTES:
            if not create:
                return False
            os.replace(path, os.path.join(folder, JOURNAL_BEFORE))
            os.close(fd)
            fd = -1
            fresh = _open(path, create=True)
            if fresh is None:
                return False
            fd, size = fresh, 0
        # whoever wrote last may have been cut off in the middle of a line
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        os.write(fd, (b"\n" if torn else b"") + line + b"\n")
    finally:
        if fd >= 0:
            os.close(fd)
    return True


def _open(path: str, *, create: bool) -> int | None:
    """Open the journal; None where it is no regular file, or there is none and none is to be made."""
    try:
        fd = os.open(path, _FLAGS | (os.O_CREAT if create else 0), 0o666)
    except FileNotFoundError:
        if create:
            raise
        return None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        return None
    return fd
