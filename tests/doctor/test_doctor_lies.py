"""The doctor's findings, each against a file system, a disk or a kernel that lies in that one way."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asyncckpt import Checkpointer
from asyncckpt.doctor import Finding, Report, examine
from asyncckpt.doctor.ops import DoctorOps
from asyncckpt.doctor.system import Mount, System, Traffic
from asyncckpt.types import Buffer


class KernelSays(System):
    """A mount of the test's choice, and what its disk counted before and after the fsyncs."""

    def __init__(self, mount: Mount | None = None, *traffic: Traffic, cache: str = "", rotating: bool = False) -> None:
        super().__init__()
        self._mount, self._traffic = mount, list(traffic)
        self._cache, self._rotating = cache, rotating

    def mount(self, path: str) -> Mount | None:
        return self._mount

    def write_cache(self, mount: Mount) -> str:
        return self._cache

    def rotating(self, mount: Mount) -> bool:
        return self._rotating

    def traffic(self, mount: Mount) -> Traffic | None:
        return self._traffic.pop(0) if self._traffic else None


class Lying(DoctorOps):
    """Every call named in ``lies`` is answered by that function, which gets the honest one first."""

    def __init__(self, **lies: Callable[..., Any]) -> None:
        for name, lie in lies.items():
            honest = getattr(super(), name)
            setattr(self, name, lambda *args, _lie=lie, _honest=honest: _lie(_honest, *args))


def refuse(code: int) -> Callable[..., Any]:
    def raises(honest: object, *args: object) -> Any:
        raise OSError(code, os.strerror(code))

    return raises


def look(path: Path, ops: DoctorOps | None = None, system: System | None = None, **options: Any) -> Report:
    options = {"seconds": 0, "max_bytes": 1 << 20} | options
    report = examine(path, ops=ops or DoctorOps(), system=system or KernelSays(), **options)
    assert os.listdir(path) == [], "nothing is left behind"
    return report


def the(report: Report, check: str) -> Finding:
    found = [one for one in report.findings if one.check == check]
    assert len(found) == 1, [one.check for one in report.findings]
    return found[0]


def setting(report: Report, name: str) -> Any:
    return next(one.value for one in report.settings if one.name == name)


def never_direct(honest: Any, path: str, flags: int, mode: int = 0o666) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return int(honest(path, flags, mode))


def creates_twice(honest: Any, path: str, flags: int, mode: int = 0o666) -> int:
    return int(honest(path, flags & ~os.O_EXCL, mode))


def wrong_bytes(honest: Any, fd: int, buffer: Buffer, offset: int) -> int:
    got = int(honest(fd, buffer, offset))
    memoryview(buffer)[0] ^= 1
    return got


def replaces(honest: Any, source: str, target: str) -> int:
    os.rename(source, target)
    return 0


def changes_names(honest: Any, path: str) -> None:
    honest(path.replace("é", "e"))


def no_case(honest: Any, path: str) -> bool:
    folder, name = os.path.split(path)
    return name.casefold() in {one.casefold() for one in os.listdir(folder)}


def yesterday(honest: Any, path: str) -> Any:
    info = honest(path)
    return SimpleNamespace(st_mtime=info.st_mtime - 86_400, st_ino=info.st_ino, st_size=info.st_size)


def no_equals_signs(honest: Any, path: str) -> None:
    if "=" in os.path.basename(path):
        raise OSError(errno.EINVAL, "Invalid argument")
    honest(path)


def short_names(honest: Any, path: str) -> None:
    if len(os.path.basename(path)) > 143:  # ecryptfs
        raise OSError(errno.ENAMETOOLONG, "File name too long")
    honest(path)


def full(honest: Any, fd: int, data: Buffer, offset: int) -> int:
    if memoryview(data).nbytes > 100_000:
        raise OSError(errno.ENOSPC, "No space left on device")
    return int(honest(fd, data, offset))


def refuses_transfers(honest: Any, fd: int, data: Buffer, offset: int) -> int:
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return int(honest(fd, data, offset))


def nothing(honest: object, *args: object) -> None:
    """Says that it is done."""


def nothing_renamed(honest: Any, source: str, target: str) -> int:
    return errno.EEXIST if os.path.lexists(target) else 0


def flags_refused_late(honest: Any, source: str, target: str) -> int:
    """As on NFS: the kernel sees a target that is there before it asks the file system."""
    return errno.EEXIST if os.path.lexists(target) else errno.EINVAL


NO_NOREPLACE = {"try_rename_noreplace": lambda honest, source, target: errno.EINVAL}

LIES = [
    ("O_DIRECT", "note", "not at open", {"open": never_direct}),
    ("O_DIRECT", "note", "transfers are refused", {"pwrite": refuses_transfers}),
    ("O_DIRECT", "unsafe", "not what was written", {"preadv": wrong_bytes}),
    ("exclusive creation", "unsafe", "created twice", {"open": creates_twice}),
    ("directory fsync", "unsafe", "failed: Invalid argument", {"fsync_directory": refuse(errno.EINVAL)}),
    ("rename without replacing", "unsafe", "directory was replaced", {"try_rename_noreplace": replaces}),
    ("rename without replacing", "unsafe", "did not rename", {"try_rename_noreplace": nothing_renamed}),
    ("rename without replacing", "note", "not by the kernel (EINVAL)", {"try_rename_noreplace": flags_refused_late}),
    ("rename without replacing", "note", "not by the kernel (EINVAL)", NO_NOREPLACE),
    ("rename without replacing", "unsafe", "the stand-in", NO_NOREPLACE | {"rename_noreplace": replaces}),
    ("rename exchanging", "note", "not here", {"exchange": refuse(errno.EINVAL)}),
    ("hard links", "note", "none (Operation not permitted)", {"link": refuse(errno.EPERM)}),
    ("hard links", "note", "a link is a copy", {"link": lambda honest, one, two: shutil.copy(one, two)}),
    ("reflinks", "note", "none (", {"reflink": refuse(errno.EOPNOTSUPP)}),
    ("reflinks", "good", "share their blocks", {"reflink": lambda honest, one, two: shutil.copy(one, two)}),
    ("locks", "warning", "no flock (No locks available)", {"lock_whole": refuse(errno.ENOLCK)}),
    ("locks", "unsafe", "took a flock that was held", {"lock_whole": nothing}),
    ("locks", "good", "flock kept", {"lock_open_description": refuse(errno.EINVAL)}),
    ("names", "note", "255 characters", {"mkdir": short_names}),
    ("names", "note", "UTF-8 (changed)", {"mkdir": changes_names}),
    ("names", "warning", "dots", {"mkdir": no_equals_signs}),
    ("case", "note", "one name", {"exists": no_case}),
    ("clock", "note", "-86400 s off", {"lstat": yesterday}),
    ("largest file", "note", "2147483647 bytes", {"can_seek": lambda honest, fd, offset: offset < 2 << 30}),
    ("fsync", "unsafe", "failed: No space left", {"pwrite": full}),
    ("fsync: page cache", "unsafe", "3 pages still dirty", {"unwritten_pages": lambda honest, fd: 3}),
    ("fsync time", "warning", "suspiciously fast", {"fsync": nothing}),
]


@pytest.fixture
def memory() -> Iterator[Path]:
    """In memory, for what needs no disk."""
    path = Path("/dev/shm", f"asyncckpt-test-doctor-{os.getpid()}")
    path.mkdir()
    yield path
    shutil.rmtree(path)


def needs_direct(path: Path) -> None:
    try:
        os.close(os.open(path / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("tmpfs has O_DIRECT since Linux 6.6")
    finally:
        (path / "probe").unlink()


@pytest.mark.parametrize(("check", "status", "seen", "lies"), LIES)
def test_each_lie_is_found(memory: Path, check: str, status: str, seen: str, lies: Mapping[str, Any]) -> None:
    if check == "O_DIRECT" and "open" not in lies:
        needs_direct(memory)
    finding = the(look(memory, Lying(**lies)), check)
    assert finding.status == status
    assert seen in finding.seen
    if status != "good" and check != "reflinks" and "copy" not in seen:
        assert finding.advice


def test_an_honest_file_system_gets_no_finding_but_a_missing_reflink(tmp_path: Path) -> None:
    report = look(tmp_path)
    doubts = {one.check for one in report.findings if one.status != "good"}
    assert doubts <= {"file system", "reflinks", "huge pages", "fsync time"}, doubts
    assert not report.unsafe


def test_what_a_remote_file_system_lacks_weighs_more(memory: Path) -> None:
    report = look(memory, Lying(**NO_NOREPLACE), KernelSays(Mount("nfs4", "server:/x")))
    assert the(report, "rename without replacing").status == "warning"
    assert the(report, "locks").status == "warning"
    assert setting(report, "ttl_seconds") > 60, "attribute caches hide a beat for a minute"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
def test_where_nothing_can_be_written_nothing_is_recommended(memory: Path, code: int) -> None:
    report = look(memory, Lying(mkdir=refuse(code)))
    assert report.unsafe
    assert os.strerror(code) in the(report, "writing").seen
    assert the(report, "writing").advice
    assert report.code() == ""


def test_an_fsync_that_does_nothing_is_caught_by_the_page_cache(tmp_path: Path) -> None:
    """No double's word for it: dirty pages of a real file system."""
    probe = os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT)
    os.write(probe, bytes(4096))
    dirty = DoctorOps().unwritten_pages(probe)
    os.close(probe)
    os.unlink(tmp_path / "probe")
    if not dirty:
        pytest.skip("no cachestat here, or a file system without dirty pages")
    report = look(tmp_path, Lying(fsync=nothing))
    assert the(report, "fsync: page cache").status == "unsafe"
    assert setting(report, "read_back") is True


ALL = 1 << 20


@pytest.mark.parametrize(
    ("file_system", "cache", "written", "flushes", "status"),
    [
        ("ext4", "write back", ALL, 5, "good"),
        ("ext4", "write back", ALL, 0, "unsafe"),
        ("ext4", "write through", ALL, 0, "good"),
        ("ext4", "write back", ALL - 1, 5, "unsafe"),
        ("btrfs", "write back", 10, 5, "good"),  # it compresses
        ("btrfs", "write back", ALL, 0, "unsafe"),
    ],
)
def test_the_disks_own_counters_say_whether_fsync_reaches_it(
    memory: Path, file_system: str, cache: str, written: int, flushes: int, status: str
) -> None:
    traffic = Traffic(1000, 70), Traffic(1000 + written, 70 + flushes)
    report = look(memory, None, KernelSays(Mount(file_system), *traffic, cache=cache))
    assert the(report, "fsync: device").status == status


def test_a_rotating_disk_that_answers_too_soon_is_noted(memory: Path) -> None:
    report = look(memory, Lying(fsync=lambda honest, fd: sum(range(10_000))), KernelSays(Mount("xfs"), rotating=True))
    assert the(report, "fsync time").status == "note"
    assert "rotating" in the(report, "fsync time").seen


def test_a_flush_that_outruns_the_disk_is_suspicious(memory: Path) -> None:
    """O_DIRECT shows what the disk can do; buffered bytes that fsync 'wrote' much faster were not written."""

    def crawls(honest: Any, fd: int, data: Buffer, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            never.wait(0.1)
        return int(honest(fd, data, offset))

    needs_direct(memory)
    never = threading.Event()
    busy = {"fsync": lambda honest, fd: sum(range(10_000))}
    report = look(memory, Lying(pwrite=crawls, **busy), KernelSays(Mount("xfs")), seconds=0.4)
    assert the(report, "fsync time").status == "warning"
    assert "times the disk's rate" in the(report, "fsync time").seen
    assert setting(report, "direct") is False, "the page cache is much faster"


@pytest.mark.parametrize(
    ("change", "check", "status"),
    [
        ({"f_bavail": 1000}, "free space", "unsafe"),
        ({"f_bavail": 100_000}, "free space", "warning"),
        ({"f_favail": 3}, "free inodes", "warning"),
        ({"f_blocks": 0}, "free space", "note"),
    ],
)
def test_little_room_is_found(memory: Path, change: Mapping[str, int], check: str, status: str) -> None:
    room = {"f_bavail": 1 << 30, "f_frsize": 4096, "f_blocks": 1 << 31, "f_files": 10**6, "f_favail": 10**6} | change
    report = look(memory, Lying(statvfs=lambda honest, path: SimpleNamespace(**room)))
    assert the(report, check).status == status


def test_room_is_counted_in_checkpoints_of_the_run(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"note": "x" * 500_000}).result()
    [entry] = run.ls()
    room = SimpleNamespace(f_bavail=500, f_frsize=1 << 20, f_blocks=1 << 31, f_files=0, f_favail=0)
    lie = Lying(statvfs=lambda honest, path: room)
    assert (
        f"{(500 << 20) // entry.nbytes} more" in the(examine(tmp_path / "run", seconds=0, ops=lie), "free space").seen
    )


@pytest.mark.parametrize(("free_bytes", "status"), [(1 << 30, "warning"), (2 << 30, "good")])
def test_room_for_one_more_checkpoint_is_too_little(memory: Path, free_bytes: int, status: str) -> None:
    """The next one is written before an older one is deleted."""
    with Checkpointer(memory / "run") as run:
        run.save(1, {"w": torch.zeros(150 << 20, dtype=torch.uint8)}).result()
    [entry] = run.ls()
    room = SimpleNamespace(f_bavail=free_bytes * entry.nbytes >> 30, f_frsize=1, f_blocks=1, f_files=0, f_favail=0)
    lie = Lying(statvfs=lambda honest, path: room)
    assert the(examine(memory / "run", seconds=0, max_bytes=1 << 20, ops=lie), "free space").status == status


def test_a_file_size_limit_becomes_a_shard_size(memory: Path) -> None:
    report = look(memory, Lying(can_seek=lambda honest, fd, offset: offset < (1 << 32)))  # FAT
    assert setting(report, "shard_bytes") == 2 << 30
    assert "shard_bytes=2 << 30" in report.code()


def test_libeatmydata_is_seen(memory: Path, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/maps").write_text("7f00-7f01 r-xp 0 08:01 1 /usr/lib/libeatmydata.so.1\n")
    finding = the(look(memory, None, System(str(tmp_path))), "fsync")
    assert (finding.status, "eatmydata" in finding.seen) == ("unsafe", True)
