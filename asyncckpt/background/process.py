"""The trainer's end of its background process: it starts one, hears what it reports, and notices its death."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import site
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asyncckpt import forks, interrupts
from asyncckpt.background.messages import Hello
from asyncckpt.background.wire import Channel, HandedUnit

log = logging.getLogger("asyncckpt")

#: A process that is told to end, and has nothing to do any more, is killed after so long.
_END_SECONDS = 5.0


class BackgroundProcess:
    """One child process. ``hello``, ``descriptors``: its first message. ``heard``: called with each message of the
    process, and ``ended`` once it is gone, with this object and the reason, both on a thread of its own. The
    constructor returns before the process has started; what is sent waits for it. Thread-safe."""

    def __init__(
        self,
        hello: Hello,
        descriptors: Sequence[int],
        heard: Callable[[dict[str, Any]], None],
        ended: Callable[[BackgroundProcess, str], None],
    ) -> None:
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        self._heard = heard
        self._ended = ended
        self._child: subprocess.Popen[bytes] | None = None
        #: Set once the process serves, or is gone.
        self._settled = threading.Event()
        self._gone = threading.Event()
        self.is_ready = self.was_ready = False
        #: Whether this process has been told to end.
        self._closing = False
        forks.disarm_in_child(self)
        arguments = (hello, descriptors, theirs)
        threading.Thread(target=self._run, args=arguments, name="asyncckpt-background", daemon=True).start()

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended, or was never there."""
        return self._gone.is_set()

    def wait_ready(self, timeout_seconds: float) -> bool:
        """Block until the process serves; False where it does not come to that in time."""
        return interrupts.wait_for(self._settled.wait, timeout_seconds) and self.is_ready

    def send(self, message: object, descriptors: Sequence[int] = ()) -> None:
        """Send a message. Blocks only where the process takes nothing; after a minute of that it is killed. Does
        nothing where it is gone: whoever waits for an answer hears of that by ``ended``."""
        self._trying(lambda: self._channel.send(message, descriptors))

    def send_units(self, units: Sequence[HandedUnit]) -> None:
        """Send units that are staged; see ``send``."""
        self._trying(lambda: self._channel.send_units(units))

    def _trying(self, send: Callable[[], None]) -> None:
        try:
            send()
        except OSError:
            self.kill()

    def kill(self) -> None:
        """End the process at once; ``ended`` is called once it is gone. Idempotent."""
        child = self._child
        if child is not None and not self._gone.is_set():
            with contextlib.suppress(OSError):
                child.kill()

    def close(self) -> None:
        """Have the process end once it has nothing to do. Does not wait. Idempotent."""
        self._closing = True
        self._channel.shut()

    def wait_gone(self) -> None:
        """Block until the process that was told to end has ended; kill it after some seconds."""
        if not self._gone.wait(_END_SECONDS):
            log.warning("the background process hangs; it is killed")
            self.kill()
            self._gone.wait(_END_SECONDS)

    def disarm(self) -> None:
        """In a forked child, close its copy of the socket."""
        self._channel.close_here()

    def _run(self, hello: Hello, descriptors: Sequence[int], theirs: socket.socket) -> None:
        reason = "it could not be started"
        try:
            try:
                self._child = _start(theirs.fileno())
                self._channel.send(hello, descriptors)
            finally:
                theirs.close()
            while (message := self._channel.receive()) is not None:
                if message["about"] == "ready":
                    self.is_ready = self.was_ready = True
                    self._settled.set()
                else:
                    self._heard(message)
            reason = self._reap(self._child)
        except Exception as error:
            log.exception("the background process is given up")
            reason = f"{reason} ({error})"
            self.kill()
            if self._child is not None:
                self._reap(self._child)
        finally:
            self._channel.close()
            self._gone.set()
            self._settled.set()
            self.is_ready = False
            self._ended(self, "" if self._closing else reason)

    def _reap(self, child: subprocess.Popen[bytes]) -> str:
        """Wait until the child is gone, and return what it died of."""
        try:
            code = child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:  # it has closed its socket, and does not end
            child.kill()
            code = child.wait()
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"it died by {signal.Signals(-code).name}"
        return f"it ended with code {code}"


def _start(descriptor: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "asyncckpt.background", str(descriptor), str(os.getpid())]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=_environment(),
        pass_fds=(descriptor,),
        start_new_session=True,
    )


def _environment() -> dict[str, str]:
    """Return the environment in which the child finds this very package. Libraries of its own use one thread each: it
    is to leave the processor to training."""
    root = str(Path(__file__).resolve().parents[2])
    environment = dict(os.environ)
    if root not in [*site.getsitepackages(), site.getusersitepackages()]:
        paths = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return environment | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
