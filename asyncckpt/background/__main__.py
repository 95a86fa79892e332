"""Run as ``python -m asyncckpt.background FD``, which the trainer does: nobody else has a use for it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys

from asyncckpt.background.server import Server
from asyncckpt.background.wire import Channel, watch

#: Training goes first, where both want the processor.
_NICENESS = 5


def main(descriptor: int, trainer: int) -> None:
    """Serve the process ``trainer``, by the socket that has this descriptor, until it is gone and all that it has left
    is published or given up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a launcher's signals are for the trainer, which tells this process
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as group:  # a session has a priority, too
        group.write(str(_NICENESS))
    peer = watch(trainer)
    if os.getppid() != trainer:  # it is gone already, and its number may be another process's
        peer = -1
    server = Server(Channel(socket.socket(fileno=descriptor), peer))
    logging.getLogger("asyncckpt").addHandler(server.log_handler())
    logging.getLogger("asyncckpt").setLevel(logging.INFO)
    logging.getLogger("asyncckpt").propagate = False
    server.serve()
    os._exit(0)  # a thread that hangs in the kernel must not keep the process


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
