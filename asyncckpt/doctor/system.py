"""``System`` reads what the kernel says about a directory: its file system, and the device below it. It never
writes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

#: On these, locks and clocks belong to another machine, or to another program.
_REMOTE = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|lustre|ceph|9p|virtiofs|afs|gpfs|beegfs(_nodev)?|pvfs2|orangefs|vboxsf|prl_fs|fuse(\..*)?"
)
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "hugetlbfs"})
_SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class Mount:
    """Describes one line of ``/proc/self/mountinfo``. ``journalled`` is None where it cannot be known. ``disks`` are
    the block devices at the bottom, below device mapper and RAID; empty where there are none or they cannot be
    known."""

    file_system: str
    source: str = ""
    point: str = "/"
    options: frozenset[str] = frozenset()
    journalled: bool | None = None
    disks: tuple[Path, ...] = field(default=())

    @property
    def remote(self) -> bool:
        return _REMOTE.fullmatch(self.file_system) is not None

    @property
    def in_memory(self) -> bool:
        return self.file_system in _IN_MEMORY


@dataclass(frozen=True, slots=True)
class Traffic:
    """Counts what block devices did since the machine began."""

    written_bytes: int
    flushes: int


class System:
    """Reads ``/proc`` and ``/sys`` below a root of the caller's choice."""

    def __init__(self, root: str = "/") -> None:
        self._root = Path(root)

    def mount(self, path: str) -> Mount | None:
        """Return the mount that holds ``path``; None where the kernel does not say."""
        real = os.path.realpath(path)
        best: Mount | None = None
        device = ""
        for line in self._read("proc/self/mountinfo").splitlines():
            left, _, right = line.partition(" - ")
            fields, rest = left.split(" "), right.split(" ")
            if len(fields) < 6 or len(rest) < 3:
                continue
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
            inside = real == point or real.startswith(point.rstrip("/") + "/")
            if inside and (best is None or len(point) >= len(best.point)):  # the one mounted last lies on top
                options = frozenset([*fields[5].split(","), *rest[2].split(",")])
                best, device = Mount(rest[0], rest[1], point, options), fields[2]
        if best is None:
            return None
        block = self._block(best.source, device)
        journalled = self._journalled(best.file_system, block) if block else None
        disks = tuple(_bottom(block)) if block else ()
        return Mount(best.file_system, best.source, best.point, best.options, journalled, disks)

    def write_cache(self, mount: Mount) -> str:
        """Return ``write back`` where any disk below has a volatile cache, ``write through`` where none has, and
        nothing where it is unknown."""
        found = {_text(disk / "queue/write_cache") for disk in mount.disks}
        return "write back" if "write back" in found else "" if not found or "" in found else "write through"

    def rotating(self, mount: Mount) -> bool:
        """Whether all disks below say that they rotate. Virtual disks may say so for no reason."""
        return bool(mount.disks) and all(_text(disk / "queue/rotational") == "1" for disk in mount.disks)

    def traffic(self, mount: Mount) -> Traffic | None:
        """Return the counters of the disks below; None where the kernel keeps none."""
        written = flushes = 0
        for disk in mount.disks:
            numbers = _text(disk / "stat").split()
            if len(numbers) < 17 or _text(disk / "queue/iostats") == "0":  # Linux counts flushes since 5.5
                return None
            written += int(numbers[6]) * _SECTOR_BYTES
            flushes += int(numbers[15])
        return Traffic(written, flushes) if mount.disks else None

    def fsync_is_off(self) -> bool:
        """Whether a library that makes fsync do nothing (libeatmydata) is loaded into this process."""
        return "libeatmydata" in self._read("proc/self/maps")

    def memory_pages(self) -> str:
        """Return the setting of huge pages: ``always``, ``madvise`` or ``never``; nothing where it cannot be found."""
        chosen = re.search(r"\[(\w+)\]", self._read("sys/kernel/mm/transparent_hugepage/enabled"))
        return chosen[1] if chosen else ""

    def _block(self, source: str, device: str) -> Path | None:
        """Find the block device's place in ``/sys`` by its number, or by the source's (btrfs has a number of its
        own)."""
        found = self._root / "sys/dev/block" / device
        if not found.exists() and source.startswith("/dev/"):
            try:
                number = os.stat(source).st_rdev
            except OSError:
                return None
            found = self._root / "sys/dev/block" / f"{os.major(number)}:{os.minor(number)}"
        return found.resolve() if found.exists() else None

    def _journalled(self, file_system: str, block: Path) -> bool | None:
        if file_system not in ("ext3", "ext4"):
            return None
        if not (self._root / "proc/fs/ext4" / block.name).exists():
            return None  # this container shows only a part of /proc
        try:
            journals = [entry.name for entry in (self._root / "proc/fs/jbd2").iterdir()]
        except FileNotFoundError:
            journals = []
        except OSError:
            return None
        return any(name.rpartition("-")[0] == block.name for name in journals)

    def _read(self, name: str) -> str:
        return _text(self._root / name)


def _bottom(block: Path) -> set[Path]:
    """Return the disks below: through device mapper and RAID, and from a partition to its disk."""
    try:
        below = [entry.resolve() for entry in (block / "slaves").iterdir()]
    except OSError:
        below = []
    if below:
        return {disk for one in below for disk in _bottom(one)}
    return {block.parent if (block / "partition").exists() else block}


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
