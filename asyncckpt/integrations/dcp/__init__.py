"""``torch.distributed.checkpoint`` with this library's files: ``dcp.save(state, storage_writer=Writer(...))``.

Each rank writes what DCP's plan gives it into a file of its own, past the page cache, hashed on the way; the
coordinator publishes all of it with one rename, after everything is on the disk. Such a checkpoint obeys the same
manifest as any other: ``asyncckpt verify``, ``ls`` and ``export`` work on it, its tensors restore into any sharding.
No pickle is written or read: what is no tensor has to be plain values (numbers, strings, lists, dicts, …).
"""

from __future__ import annotations

from asyncckpt.integrations.dcp.reader import Reader
from asyncckpt.integrations.dcp.sides import Stager
from asyncckpt.integrations.dcp.writer import Writer

__all__ = ["Reader", "Stager", "Writer"]
