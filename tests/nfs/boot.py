"""PID 1 of a guest: what the kernel needs to be a machine, then commands from the host. Only the standard library.

boot.py NAME ADDRESS FOLDER: the guest's host name, its address, and the folder of the host that it shares
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path

from calls import serve

_FINIT_MODULE = 313  # the number of the call on x86-64, the only machine that User-Mode Linux is built for in Debian
_MODULES = ("nfsd", "nfsv3", "nfsv4")
#: A server that comes back waits that long for clients to say which locks they had: the kernel's minute and a half
#: would be most of a test.
_LOCK_GRACE = {"lockd": "nlm_timeout=3 nlm_grace_period=6"}


def main(name: str, address: str, folder: str) -> None:
    _mount("proc", "/proc", "proc")
    _mount("sysfs", "/sys", "sysfs")
    _mount("tmpfs", "/run", "tmpfs")
    for path in ("share", "tmp", "rpc_pipefs", "nfs/sm", "nfs/sm.bak", "nfs/v4recovery", "nfs/nfsdcld"):
        Path("/run", path).mkdir(parents=True)
    _mount("none", "/run/share", "hostfs", f"-o{folder}")
    _load_modules()
    _mount("sunrpc", "/run/rpc_pipefs", "rpc_pipefs")
    socket.sethostname(name)
    Path("/run/hosts").write_text("127.0.0.1 localhost\n10.0.0.1 server\n10.0.0.2 client\n")
    run(["mount", "--bind", "/run/hosts", "/etc/hosts"])
    run(["ip", "link", "set", "lo", "up"])
    run(["ip", "address", "add", f"{address}/24", "dev", "vec0"])
    run(["ip", "link", "set", "vec0", "up"])
    os.environ.update(PATH="/usr/sbin:/usr/bin:/sbin:/bin", TMPDIR="/run/tmp", HOME="/run/tmp")
    serve(Path("/run/share", name, "shell"), {"run": run, "start": start})


def run(command: list[str], timeout_seconds: float = 60.0) -> str:
    """What the command says. Raises where it fails."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_seconds, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command} exits with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def start(command: list[str]) -> int:
    """The process that now runs in the background, its output on the console."""
    return subprocess.Popen(command, stdin=subprocess.DEVNULL).pid


def _mount(source: str, path: str, kind: str, *options: str) -> None:
    run(["mount", "-t", kind, *options, source, path])


def _load_modules() -> None:
    """As modprobe would, which is not everywhere."""
    root = Path("/usr/lib/uml/modules", os.uname().release)
    needs = {}
    for line in (root / "modules.dep").read_text().splitlines():
        module, _, others = line.partition(":")
        needs[Path(module).stem] = [module, *others.split()]
    libc = ctypes.CDLL(None, use_errno=True)
    for name in _MODULES:
        for module in reversed(needs[name]):
            options = _LOCK_GRACE.get(Path(module).stem, "")
            fd = os.open(root / module, os.O_RDONLY)
            if libc.syscall(_FINIT_MODULE, fd, options.encode(), 0) and ctypes.get_errno() != 17:  # there already
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), module)
            os.close(fd)


if __name__ == "__main__":
    main(*sys.argv[1:4])  # the kernel may add words of its own
