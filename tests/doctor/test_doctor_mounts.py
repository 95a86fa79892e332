"""What the doctor makes of ``/proc`` and ``/sys``: types and options of mounts, the disks below."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncckpt.doctor import mounts
from asyncckpt.doctor.system import Mount, System, Traffic

TYPES = [
    ("tmpfs", "", "file system", "unsafe"),
    ("overlay", "", "file system", "warning"),
    ("nfs4", "", "file system", "warning"),
    ("lustre", "flock", "file system", "warning"),
    ("fuse.sshfs", "", "file system", "warning"),
    ("xfs", "", "file system", "good"),
    ("fuseblk", "", "file system", "warning"),
    ("ext4", "nobarrier", "barriers", "unsafe"),
    ("ext4", "barrier=0", "barriers", "unsafe"),
    ("overlay", "volatile", "barriers", "unsafe"),
    ("ext4", "data=writeback", "mount options", "note"),
    ("xfs", "sync", "mount options", "note"),
    ("btrfs", "notreelog", "mount options", "note"),
    ("nfs", "nolock", "mount options", "warning"),
    ("nfs4", "local_lock=all", "mount options", "warning"),
    ("nfs4", "soft", "mount options", "note"),
    ("lustre", "localflock", "mount options", "warning"),
]


@pytest.mark.parametrize(("file_system", "option", "check", "status"), TYPES)
def test_types_and_options_of_mounts(file_system: str, option: str, check: str, status: str) -> None:
    mount = Mount(file_system, "/dev/x", "/", frozenset([option]))
    found = {one.check: one.status for one in mounts.checks(mount, System())}
    assert found[check] == status
    assert check == "file system" or len(found) <= 3


def _kernel(root: Path, *lines: str) -> System:
    files = {
        "proc/self/mountinfo": "\n".join(lines),
        "proc/fs/ext4/sda1/options": "",
        "proc/fs/ext4/sdb/options": "",
        "proc/fs/jbd2/sda1-8/info": "",
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
        "sys/devices/sda/queue/write_cache": "write back\n",
        "sys/devices/sda/queue/rotational": "1\n",
        "sys/devices/sda/stat": " ".join(map(str, range(100, 117))),
        "sys/devices/sda/sda1/partition": "1",
        "sys/devices/sdb/queue/write_cache": "write through\n",
        "sys/devices/sdb/queue/rotational": "0\n",
        "sys/devices/sdb/stat": " ".join(map(str, range(200, 217))),
        "sys/devices/dm-0/stat": " ".join(["0"] * 17),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "sys/dev/block").mkdir(parents=True)
    for number, target in {"8:1": "sda/sda1", "8:16": "sdb", "253:0": "dm-0"}.items():
        (root / "sys/dev/block" / number).symlink_to(root / "sys/devices" / target)
    (root / "sys/devices/dm-0/slaves").mkdir()
    for part in ("sda/sda1", "sdb"):
        (root / "sys/devices/dm-0/slaves" / part.replace("/", "-")).symlink_to(root / "sys/devices" / part)
    return System(str(root))


def test_what_the_kernel_says_is_read_right(tmp_path: Path) -> None:
    system = _kernel(
        tmp_path / "root",
        "20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,data=ordered",
        "21 20 8:16 / /data rw - ext4 /dev/sdb rw,nobarrier",
        "22 20 253:0 / /with\\040space rw - xfs /dev/mapper/pair rw",
        "23 21 0:50 / /data/deep rw - tmpfs none rw",
        "nonsense",
    )
    root, data = system.mount("/etc"), system.mount("/data/run")
    assert root is not None
    assert data is not None
    assert (root.file_system, root.journalled, root.source) == ("ext4", True, "/dev/sda1")
    assert (data.journalled, "nobarrier" in data.options) == (False, True)
    assert (system.write_cache(root), system.write_cache(data)) == ("write back", "write through")
    assert (system.rotating(root), system.rotating(data)) == (True, False)
    assert system.traffic(root) == Traffic(106 * 512, 115)
    deep, pair = system.mount("/data/deep/er"), system.mount("/with space/run")
    assert deep is not None
    assert pair is not None
    assert deep.in_memory
    assert system.traffic(deep) is None
    assert system.traffic(pair) == Traffic((106 + 206) * 512, 115 + 215), "of both disks below"
    assert system.write_cache(pair) == "write back", "one of them has one"
    assert system.memory_pages() == "never"
    assert System(str(tmp_path)).mount("/") is None
