"""Whether a checkpointer's saves are written by a background process or by threads of the trainer."""

from __future__ import annotations

import os
import socket
import sys

from asyncckpt.codecs import codecs
from asyncckpt.memory.region import can_share
from asyncckpt.protocols import Codec, Store
from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.posix import PosixOps
from asyncckpt.write.options import WriterOptions

#: A state of fewer bytes is written by threads, as a process would gain nothing.
AUTO_BYTES = 256 << 20


def why_threads(options: WriterOptions, store: Store, codec: Codec, nbytes: int, *, alone: bool) -> str | None:
    """Return why threads write, as part of a sentence; None where a process does. ``nbytes``: the size of the
    state. ``alone``: this process is no rank of a job."""
    if options.process == "never":
        return "WriterOptions.process is 'never'"
    if options.process == "auto" and nbytes < AUTO_BYTES:
        return f"the state has {nbytes} bytes"
    if not alone:
        return "several ranks write together"
    if type(store) is not LocalStore or type(store.ops) is not PosixOps:
        return "the storage is no local directory"
    if type(codec).__module__ != codecs.__name__:
        return f"the codec {codec.name} is the program's own"
    if not can_share() or not hasattr(socket, "send_fds") or not hasattr(os, "setsid"):
        return "this system shares no memory by descriptor"
    if not sys.executable:
        return "it is not known how to start Python"
    return None
