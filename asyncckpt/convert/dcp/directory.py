"""Directories of ``torch.distributed.checkpoint`` out, written by torch, one tensor at a time."""

from __future__ import annotations

import warnings
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from asyncckpt.convert.exporting import Export
from asyncckpt.convert.placeholders import Placeholders
from asyncckpt.convert.stored import ORIGIN_FILE, check_overflow, origin_json, whole
from asyncckpt.read.opening import OpenCheckpoint


def write_dcp_directory(job: Export) -> None:
    """Write a directory that ``dcp.load`` opens: ``{component: state}``, an optimizer's by the names of parameters, as
    ``get_state_dict`` gives it. ``all`` has ``step`` and ``metrics`` beside them where no component has that name."""
    made = Placeholders(job)
    state: dict[str, Any] = {name: made.state(name) for name in job.components}
    if job.what == "all":
        manifest = job.checkpoint.manifest
        state = {"step": manifest.step, "metrics": dict(manifest.metrics)} | state
    planner = _Planner(job.checkpoint, made)
    job.output.write(ORIGIN_FILE, origin_json(job.checkpoint))
    writer = FileSystemWriter(job.output.path, single_file_per_rank=True, sync_files=False, thread_count=1)
    total = sum(item.nbytes for item in made.items.values())
    planner.report = lambda done: job.progress("writing", done, total)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            save(state, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise next((one for one, _ in error.failures.values()), error) from error


class _Planner(DefaultSavePlanner):
    """Reads a tensor when torch is about to write it."""

    def __init__(self, checkpoint: OpenCheckpoint, made: Placeholders) -> None:
        super().__init__()
        self._checkpoint = checkpoint
        self._made = made
        self._done = 0
        self.report: Any = None

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the value, or the tensor in memory, verified."""
        found = super().lookup_object(index)
        item = self._made.items.get(id(found))
        if item is None:
            return found
        tensor = whole(self._checkpoint, item)
        check_overflow(self._checkpoint, [(item, tensor)])
        self._done += item.nbytes
        self.report(self._done)
        return tensor
