"""These findings come from what the kernel says about the mount; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator

from asyncckpt.doctor.findings import Finding
from asyncckpt.doctor.system import Mount, System


def checks(mount: Mount | None, system: System) -> Iterator[Finding]:
    """Check the file system, its journal and options, the device's cache, and this machine's memory."""
    if mount is None:
        yield Finding("file system", "note", "unknown: the kernel does not say")
    else:
        yield _file_system(mount)
        yield from _options(mount)
        cache = system.write_cache(mount)
        if cache == "write back":
            yield Finding("device cache", "good", "volatile, as most: what is not flushed is lost with the power")
        elif cache:
            yield Finding("device cache", "good", "none that a power cut empties (write through)")
    pages = system.memory_pages()
    if pages == "never":
        advice = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: staging memory is set up faster"
        yield Finding("huge pages", "note", "never", advice)
    elif pages:
        yield Finding("huge pages", "good", pages)


def _file_system(mount: Mount) -> Finding:
    seen = f"{mount.file_system} on {mount.source}, mounted at {mount.point}"
    if mount.in_memory:
        return Finding("file system", "unsafe", seen, "this is memory: a reboot loses every checkpoint; use a disk")
    if mount.file_system in ("overlay", "aufs"):
        advice = "a container's own layer: checkpoints go when the container goes; mount a volume for them"
        return Finding("file system", "warning", seen, advice)
    if mount.file_system.startswith("fuse"):
        advice = "a program answers for it: fsync is as honest as that program"
        return Finding("file system", "warning", seen, advice)
    if mount.remote:
        advice = (
            "its locks are advisory and a server keeps the bytes: its export has to be sync, one trainer a directory"
        )
        return Finding("file system", "warning", seen, advice)
    return Finding("file system", "good", seen)


def _options(mount: Mount) -> Iterator[Finding]:
    has = mount.options
    if mount.journalled is False:
        advice = "a crash can leave directories for fsck to repair: prefer a journalled file system for checkpoints"
        yield Finding("journal", "warning", f"{mount.file_system} without a journal", advice)
    elif mount.journalled:
        yield Finding("journal", "good", "there is one")
    if has & {"nobarrier", "barrier=0"}:
        yield Finding("barriers", "unsafe", "mounted without", "fsync does not reach the disk: remount with barriers")
    if mount.file_system == "overlay" and has & {"volatile", "fsync=volatile"}:
        yield Finding("barriers", "unsafe", "a volatile overlay", "fsync does nothing: mount it without `volatile`")
    if mount.file_system == "btrfs" and "notreelog" in has:
        yield Finding("mount options", "note", "notreelog", "every fsync commits the whole file system: slower")
    if "data=writeback" in has:
        advice = (
            "files not fsynced can hold stale blocks after a crash: checkpoints are fsynced, logs beside them are not"
        )
        yield Finding("mount options", "note", "data=writeback", advice)
    if "sync" in has:
        yield Finding("mount options", "note", "sync", "every write waits for the disk: slower, and no safer here")
    nfs = mount.file_system.startswith("nfs")
    if nfs and has & {"nolock", "local_lock=all", "local_lock=flock"}:
        advice = "a second trainer on another machine is kept out by the lease's beat alone: mount with locks"
        yield Finding("mount options", "warning", "locks do not leave this machine", advice)
    if nfs and "soft" in has:
        advice = "a slow server fails saves (they are never half accepted): prefer hard mounts"
        yield Finding("mount options", "note", "soft", advice)
    if mount.file_system == "lustre" and "flock" not in has:
        advice = "mount with -o flock: else a second trainer on another machine is kept out by the lease's beat alone"
        yield Finding("mount options", "warning", "no cluster-wide flock", advice)
