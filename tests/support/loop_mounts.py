"""Tests break these file systems: small tmpfs, and ext4 in a file. A test is skipped where it may not mount."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def run_command(*command: object) -> bool:
    """Whether the command succeeded; its output is dropped."""
    done = subprocess.run([str(word) for word in command], capture_output=True, check=False, timeout=60)
    return done.returncode == 0


@contextlib.contextmanager
def tmpfs(path: Path, options: str = "size=64m") -> Iterator[Path]:
    """Mount a tmpfs at ``path`` for as long as the context lasts."""
    path.mkdir(exist_ok=True)
    if os.geteuid() or not run_command("mount", "-t", "tmpfs", "-o", options, "asyncckpt-test", path):
        pytest.skip("needs root and a kernel that mounts a tmpfs")
    try:
        yield path
    finally:
        run_command("umount", "-l", path)


def resize(path: Path, options: Callable[[], str]) -> None:
    """Give a mounted tmpfs the limits that ``options`` returns. Where they are just what is used, a lease that is
    renewed in between may have taken more: they are asked for again."""
    for _ in range(10):
        chosen = options()
        if run_command("mount", "-o", f"remount,{chosen}", path):
            return
    raise AssertionError(f"cannot remount with {chosen}")


def used_blocks(path: Path) -> int:
    """Return the blocks in use, in 4 KiB."""
    stats = os.statvfs(path)
    assert stats.f_frsize == 4096
    return stats.f_blocks - stats.f_bfree


def used_inodes(path: Path) -> int:
    stats = os.statvfs(path)
    return stats.f_files - stats.f_ffree


class Ext4:
    """A mounted ext4 that turns read-only as soon as it is told of an error, whoever is writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        source = subprocess.run(["findmnt", "-no", "SOURCE", path], capture_output=True, text=True, check=True)
        self._trigger = Path("/sys/fs/ext4", os.path.basename(source.stdout.strip()), "trigger_fs_error")

    @property
    def can_fail(self) -> bool:
        return self._trigger.exists()

    def fail(self) -> None:
        """Make the kernel remount it read-only under open files, as on a broken device."""
        self._trigger.write_text("planted by a test")


@contextlib.contextmanager
def ext4(folder: Path) -> Iterator[Ext4]:
    """Make a small ext4 below ``folder`` with ``errors=remount-ro``."""
    image, mount = folder / "image", folder / "ext4"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    if shutil.which("mkfs.ext4") is None or not run_command("mkfs.ext4", "-q", image):
        pytest.skip("needs mkfs.ext4")
    if os.geteuid() or not run_command("mount", "-o", "loop,errors=remount-ro", image, mount):
        pytest.skip("needs root, a loop device and ext4")
    try:
        disk = Ext4(mount)
        if not disk.can_fail:
            pytest.skip("this kernel has no trigger_fs_error")
        yield disk
    finally:
        run_command("umount", "-l", mount)
