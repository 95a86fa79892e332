"""These checks try what the file system promises: renames, links, locks, exclusive creation, O_DIRECT, names, sizes,
clock."""

from __future__ import annotations

import errno
import os
import resource
import time
from collections.abc import Callable, Iterator

from asyncckpt.doctor.findings import Finding, Status
from asyncckpt.doctor.scratch import Scratch
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.types import ALIGNMENT_BYTES

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_DEFAULT_SHARD_BYTES = 4 << 30
_CLOCK_SECONDS = 2.0


def checks(scratch: Scratch, *, remote: bool) -> Iterator[Finding]:
    """Yield the findings one by one. A check that fails in a way that it does not expect is a finding too. Raises
    ``RunLocked`` where a run that began meanwhile cleared the directory."""
    table: dict[str, Callable[[], Finding]] = {
        "O_DIRECT": lambda: _direct(scratch),
        "exclusive creation": lambda: _exclusive(scratch),
        "directory fsync": lambda: _directory_fsync(scratch),
        "rename without replacing": lambda: _noreplace(scratch, remote),
        "rename exchanging": lambda: _exchange(scratch),
        "hard links": lambda: _links(scratch),
        "reflinks": lambda: _reflinks(scratch),
        "locks": lambda: _locks(scratch, remote),
        "names": lambda: _names(scratch),
        "case": lambda: _case(scratch),
        "clock": lambda: _clock(scratch),
    }
    for name, check in table.items():
        yield guarded(scratch, name, check)


def guarded(scratch: Scratch, name: str, check: Callable[[], Finding]) -> Finding:
    """Return what the check found, or the finding that it failed."""
    try:
        return check()
    except OSError as error:
        scratch.check_kept()
        return failed(name, error)


def failed(name: str, error: OSError) -> Finding:
    """Make the finding that a call which saves need too did not work."""
    return Finding(name, "unsafe", f"failed: {error.strerror or error}", _way_out(error))


def largest_file(scratch: Scratch) -> int:
    """Return the largest size in bytes that a file can have, by the file system and by this process's limit. Nothing is
    written."""
    path = _make(scratch, "large")
    fd = scratch.ops.open(path, os.O_RDONLY)
    try:
        low, high = 1, 1 << 62
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if scratch.ops.can_seek(fd, middle) else (low, middle)
    finally:
        scratch.ops.close(fd)
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return low if limit == resource.RLIM_INFINITY else min(low, limit)


def size_finding(largest: int) -> Finding:
    """Say what the largest file means for shards."""
    if largest >= 1 << 40:
        return Finding("largest file", "good", "1 TiB and more")
    seen = f"{largest} bytes"
    if largest > _DEFAULT_SHARD_BYTES:
        return Finding("largest file", "good", seen)
    status: Status = "note" if largest >= 64 << 20 else "warning"
    advice = "see shard_bytes below; one tensor larger than that cannot be saved as safetensors here"
    return Finding("largest file", status, seen, advice)


def _way_out(error: OSError) -> str:
    return {
        errno.EROFS: "the file system is read-only: remount it, or choose another path",
        errno.EACCES: "no permission to write: change the directory's mode or owner",
        errno.EPERM: "no permission to write: change the directory's mode or owner",
        errno.ENOSPC: "no space or inodes left: free some",
        errno.EDQUOT: "the quota is used up: free some, or raise it",
    }.get(error.errno or 0, "checkpoints need this: choose another path")


def _make(scratch: Scratch, name: str, data: bytes = b"x") -> str:
    path = scratch.file(name)
    fd = scratch.ops.open(path, _CREATE)
    try:
        scratch.ops.pwrite(fd, data, 0)
        scratch.ops.fsync(fd)
    finally:
        scratch.ops.close(fd)
    return path


def _direct(scratch: Scratch) -> Finding:
    ops, path = scratch.ops, scratch.file("direct")
    advice = "saves go through the page cache: direct=False below spares the trial"
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return Finding("O_DIRECT", "note", "no such flag on this system", advice)
    wrote, read = aligned_buffer(ALIGNMENT_BYTES), aligned_buffer(ALIGNMENT_BYTES)
    wrote[:] = os.urandom(ALIGNMENT_BYTES)
    try:
        fd = ops.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flag)
    except OSError as error:
        return Finding("O_DIRECT", "note", f"not at open ({error.strerror})", advice)
    try:
        ops.pwrite(fd, memoryview(wrote), 0)
        ops.fsync(fd)
        ops.preadv(fd, memoryview(read), 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return Finding("O_DIRECT", "note", "at open, but transfers are refused", advice)
    finally:
        ops.close(fd)
    if wrote[:] != read[:]:
        return Finding("O_DIRECT", "unsafe", "what was read is not what was written", "use another path")
    return Finding("O_DIRECT", "good", "open, write and read back")


def _exclusive(scratch: Scratch) -> Finding:
    path = _make(scratch, "exclusive")
    try:
        scratch.ops.close(scratch.ops.open(path, _CREATE))
    except FileExistsError:
        return Finding("exclusive creation", "good", "refused where the file exists")
    return Finding(
        "exclusive creation", "unsafe", "a file was created twice", "two attempts could mix: use another path"
    )


def _directory_fsync(scratch: Scratch) -> Finding:
    scratch.ops.fsync_directory(scratch.path)
    return Finding("directory fsync", "good", "works")


def _noreplace(scratch: Scratch, remote: bool) -> Finding:
    """Try to rename onto an empty directory, which a plain rename would replace without a word."""
    ops, check = scratch.ops, "rename without replacing"
    one, two = scratch.file("rename-a"), scratch.file("rename-b")
    ops.mkdir(one)
    ops.mkdir(two)
    code = ops.try_rename_noreplace(one, two)
    if code == errno.EEXIST:
        # the kernel looks for the target before it asks the file system, which may still refuse the flag (NFS does)
        code = ops.try_rename_noreplace(one, scratch.file("rename-c"))
        if code == 0:
            if ops.exists(one) or not ops.exists(scratch.file("rename-c")):
                return Finding(check, "unsafe", "a rename that succeeded did not rename", "use another path")
            return Finding(check, "good", "by the kernel, an empty directory included")
    elif code == 0:
        return Finding(
            check, "unsafe", "an existing directory was replaced", "checkpoints can vanish: use another path"
        )
    try:
        ops.rename_noreplace(one, two)
    except FileExistsError:
        status: Status = "warning" if remote else "note"
        seen = f"not by the kernel ({errno.errorcode.get(code, code)}); a lock and a check stand in"
        return Finding(check, status, seen, "let one trainer at a time use the directory")
    return Finding(check, "unsafe", "the stand-in replaced a directory", "checkpoints can vanish: use another path")


def _exchange(scratch: Scratch) -> Finding:
    ops = scratch.ops
    one, two = scratch.file("exchange-a"), scratch.file("exchange-b")
    ops.mkdir(one)
    _make(scratch, "exchange-b")
    try:
        ops.exchange(one, two)
    except OSError as error:
        advice = "RunOptions(overwrite=True) fails here: save every step once"
        return Finding("rename exchanging", "note", f"not here ({error.strerror})", advice)
    return Finding("rename exchanging", "good", "by the kernel: RunOptions(overwrite=True) works")


def _links(scratch: Scratch) -> Finding:
    path, other = _make(scratch, "linked"), scratch.file("link")
    advice = "unchanged files are written again at each save, unless there are reflinks"
    try:
        scratch.ops.link(path, other)
    except OSError as error:
        return Finding("hard links", "note", f"none ({error.strerror})", advice)
    if scratch.ops.lstat(path).st_ino != scratch.ops.lstat(other).st_ino:
        return Finding("hard links", "note", "a link is a copy here: unchanged files take space again")
    return Finding("hard links", "good", "unchanged files are linked, not written")


def _reflinks(scratch: Scratch) -> Finding:
    path = _make(scratch, "shared", bytes(ALIGNMENT_BYTES))
    try:
        scratch.ops.reflink(path, scratch.file("reflink"))
    except OSError as error:
        return Finding("reflinks", "note", f"none ({error.strerror})")
    return Finding("reflinks", "good", "unchanged files share their blocks")


def _locks(scratch: Scratch, remote: bool) -> Finding:
    """Try ``flock``, which the lease uses, and open file description locks, which other tools may use."""
    ops, path, held = scratch.ops, _make(scratch, "lock"), []
    for kind, lock in (("flock", ops.lock_whole), ("ofd", ops.lock_open_description)):
        fd = ops.open(path, os.O_RDWR)
        try:
            lock(fd)
            taken = ops.lock_elsewhere(path, kind)
        except OSError as error:
            if kind == "ofd":
                continue
            advice = "nothing but the lease's beat keeps a second trainer out: start one trainer a directory"
            return Finding("locks", "warning", f"no flock ({error.strerror or error})", advice)
        finally:
            ops.close(fd)
        if taken and kind == "flock":
            advice = "a second trainer would not be kept out: use another path"
            return Finding("locks", "unsafe", "another process took a flock that was held", advice)
        if not taken:
            held.append({"flock": "flock", "ofd": "OFD"}[kind])
    names = " and ".join(held)
    if remote:
        seen = f"{names} kept between processes of this machine; between machines they are advisory"
        return Finding("locks", "warning", seen, "the lease watches the other's beat too: see lease below")
    return Finding("locks", "good", f"{names} kept between processes")


def _names(scratch: Scratch) -> Finding:
    odd, long = "a=2F+b..c", "n" * 255
    refused = []
    for title, name in (("=, + and dots", odd), ("255 characters", long), ("UTF-8", "é漢")):
        try:
            scratch.ops.mkdir(scratch.file(name))
        except OSError:
            refused.append(title)
            continue
        if name not in scratch.ops.scan(scratch.path):
            refused.append(f"{title} (changed)")
    if not refused:
        return Finding("names", "good", "long and unusual ones come back as they were")
    status: Status = "warning" if any("dots" in title for title in refused) else "note"
    return Finding(
        "names", status, f"refused: {', '.join(refused)}", "use format='safetensors': fewer and plainer names"
    )


def _case(scratch: Scratch) -> Finding:
    _make(scratch, "Case")
    if scratch.ops.exists(scratch.file("cASE")):
        return Finding(
            "case", "note", "A and a are one name", "names that differ only in case are kept apart by escapes"
        )
    return Finding("case", "good", "A and a are two names")


def _clock(scratch: Scratch) -> Finding:
    path = _make(scratch, "clock")
    off = scratch.ops.lstat(path).st_mtime - time.time()
    if abs(off) <= _CLOCK_SECONDS:
        return Finding("clock", "good", "the file system's and this machine's agree")
    advice = "nothing relies on file times, but logs of both machines will disagree"
    return Finding("clock", "note", f"the file system's is {off:+.0f} s off", advice)
