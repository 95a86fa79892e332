"""``dcp.save(state, storage_writer=Writer(...))`` writes this library's checkpoints, and ``Reader`` lets ``dcp.load``
read them.

Each rank writes what DCP's plan gives it into a file of its own, past the page cache, and hashes it on the way. Once
everything is on the disk, the coordinator publishes all of it with one rename. Such a checkpoint has the same manifest
as any other: ``asyncckpt verify``, ``ls`` and ``export`` work on it, and its tensors restore into any sharding. No
pickle is written or read: what is not a tensor has to be a plain value (numbers, strings, lists, dicts, …).
"""

from __future__ import annotations

from asyncckpt.integrations.dcp.reader import Reader
from asyncckpt.integrations.dcp.session import Stager
from asyncckpt.integrations.dcp.writer import Writer

__all__ = ["Reader", "Stager", "Writer"]
