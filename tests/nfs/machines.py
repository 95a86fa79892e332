"""Two machines, each a User-Mode Linux process: an NFS server with an ext4 of its own, and a client.

They are joined by a pair of sockets and boot from this machine's own root, read-only, so that a guest's Python is this
one. A guest that is killed with SIGKILL is a machine that lost its power: what its kernel had not yet written to its
disk is gone. What it had written stays: a disk that forgets its cache is what block replay is for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calls import Caller

KERNEL = "linux.uml"
_HERE = Path(__file__).parent
_REPOSITORY = _HERE.parent.parent
_IMAGE_BYTES = 768 << 20
_THREADS = "8"
#: In seconds: how long a server that is back waits for clients to reclaim.
_GRACE = "10"


def reason_unavailable() -> str | None:
    """What to install, or None where all is there."""
    missing = [
        package
        for package, program in {
            "user-mode-linux": KERNEL,
            "nfs-kernel-server": "rpc.nfsd",
            "nfs-common": "mount.nfs",
            "rpcbind": "rpcbind",
            "iproute2": "ip",
            "e2fsprogs": "mkfs.ext4",
        }.items()
        if _which(program) is None
    ]
    return f"apt-get install {' '.join(missing)}" if missing else None


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


class Guest:
    """A machine that runs from here on, until ``kill``. ``wire``: its end of the network."""

    def __init__(self, name: str, address: str, folder: Path, wire: socket.socket, disk: Path | None = None) -> None:
        shutil.rmtree(folder / name, ignore_errors=True)
        self._name = name
        self._folder = folder
        self._shell = Caller(folder / name / "shell", self.alive)
        self._python: Caller | None = None
        self.console = folder / f"console-{name}"
        command = [
            str(_which(KERNEL)),
            "mem=1G",
            f"uml_dir={folder}/",
            f"umid=uml-{name}",
            "root=/dev/root",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
            "devtmpfs.mount=1",
            "con=null",
            "con0=null,fd:1",
            "ssl=null",
            "quiet",
            f"vec0:transport=fd,fd={wire.fileno()},mtu=9000",
            *([f"ubd0={disk}"] if disk else []),
            f"PYTHONPATH={_HERE}:{_REPOSITORY}:{_REPOSITORY / 'tests' / 'faults'}",
            "PYTHONDONTWRITEBYTECODE=1",
            f"init={sys.executable}",
            "--",
            str(_HERE / "boot.py"),
            name,
            address,
            str(folder),
        ]
        with self.console.open("ab") as console:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                pass_fds=[wire.fileno()],
                start_new_session=True,
            )

    def alive(self) -> bool:
        return self._process.poll() is None

    def run(self, *command: str, timeout_seconds: float = 60.0) -> str:
        """What a command in the guest says; blocks until it ends. Raises ``CallFailed`` where it fails."""
        return self._shell.call("run", command=command, timeout_seconds=timeout_seconds + 30)

    def start_python(self) -> None:
        """Have it import torch and wait for calls. Takes half a minute, in the background."""
        self._python = Caller(self._folder / self._name / "python", self.alive)
        self._shell.call("start", command=[sys.executable, str(_HERE / "in_guest.py"), self._name])

    def call(self, name: str, *, timeout_seconds: float = 180.0, **arguments: Any) -> Any:
        """A function of ``in_guest.py``, called there."""
        if self._python is None:
            self.start_python()
        assert self._python is not None
        return self._python.call(name, timeout_seconds=timeout_seconds, **arguments)

    def kill(self) -> None:
        """Take its power away. Blocks until nothing of it can write to its disk any more."""
        if self.alive():
            os.killpg(self._process.pid, signal.SIGKILL)  # its processes are processes of the host
        self._process.wait()
        while _lives(self._process.pid):
            time.sleep(0.01)


def _lives(group: int) -> bool:
    """Whether any process of the group is not dead yet; one that is dead and not yet reaped does nothing."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


class Machines:
    """A server and a client of it. ``version``: of NFS, as ``mount -o vers=`` names it."""

    def __init__(self, folder: Path, version: str) -> None:
        self.folder = folder
        self.version = version
        #: ``async`` makes a server that confirms what it has not written.
        self.export = "sync"
        self.boots = 0
        self._image = folder / "image"
        with self._image.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        subprocess.run([str(_which("mkfs.ext4")), "-q", str(self._image)], check=True, capture_output=True)
        self._wires = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for wire in self._wires:
            for size in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                wire.setsockopt(socket.SOL_SOCKET, size, 1 << 20)
            wire.setblocking(False)
        self._guests: list[Guest] = []
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Boot both, and mount the export."""
        self.start_client()
        self.start_server()
        self.mount()

    def _boot(self, guest: Guest) -> Guest:
        self.boots += 1
        self._guests.append(guest)
        return guest

    def start_server(self) -> None:
        self.server = self._boot(Guest("server", "10.0.0.1", self.folder, self._wires[0], self._image))
        run = self.server.run
        run("mkdir", "/run/disk")
        run("mount", "/dev/ubda", "/run/disk")
        # what a server must not forget when it loses its power lies on its disk: who has locks, who may reclaim them
        run("sh", "-c", "test -d /run/disk/nfs || cp -a /run/nfs /run/disk/; mkdir -p /run/disk/export")
        run("touch", "/run/disk/nfs/etab", "/run/disk/nfs/rmtab")
        run("mount", "--bind", "/run/disk/nfs", "/var/lib/nfs")
        _services(self.server)
        run("mount", "-t", "nfsd", "nfsd", "/proc/fs/nfsd")
        run("nfsdcld")
        # the root of v4: the guest's own root is not one that a server can serve
        run("exportfs", "-i", "-o", f"rw,{self.export},no_root_squash,no_subtree_check,fsid=0", "*:/run/disk/export")
        run("rpc.mountd")
        self.start_serving()
        run("sm-notify", "-f")

    def start_serving(self) -> None:
        """Also after ``rpc.nfsd 0``."""
        self.server.run("rpc.nfsd", "--grace-time", _GRACE, "--lease-time", _GRACE, _THREADS)

    def start_client(self) -> None:
        self.client = self._boot(Guest("client", "10.0.0.2", self.folder, self._wires[1]))
        self.client.run("mount", "--bind", "/run/nfs", "/var/lib/nfs")
        _services(self.client)
        self.client.start_python()

    def mount(self, point: str = "/run/a", guest: Guest | None = None) -> str:
        """Mount the export, with caches of its own; the path."""
        guest = guest or self.client
        guest.run("mkdir", "-p", point)
        words = f"vers={self.version},hard,proto=tcp,timeo=50,nosharecache"
        export = "/run/disk/export" if self.version == "3" else "/"
        guest.run("mount", "-t", "nfs", "-o", words, f"10.0.0.1:{export}", point)
        return point

    def close(self) -> None:
        for guest in self._guests:
            guest.kill()
        for wire in self._wires:
            wire.close()
        self._image.unlink()


@contextlib.contextmanager
def running(folder: Path, version: str) -> Iterator[Machines]:
    """Both, up and with all imported, until the block ends."""
    machines = Machines(folder, version)
    try:
        machines.client.call("ready")
        yield machines
    finally:
        machines.close()
        print(f"NFS v{version}: {machines.boots} boots")


def _services(guest: Guest) -> None:
    """What locks of NFS v3 take, on both sides."""
    guest.run("chown", "-R", "statd", "/var/lib/nfs/sm", "/var/lib/nfs/sm.bak")
    guest.run("rpcbind")
    guest.run("rpc.statd", "--no-notify")


if __name__ == "__main__":
    if missing := reason_unavailable():
        raise SystemExit(f"make nfs needs Debian's packages: {missing}")
