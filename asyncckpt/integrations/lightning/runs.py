"""The runs that a ``Trainer`` saves into are open side by side, one for each directory, until the end of ``fit``."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from asyncckpt.errors import InvalidOption
from asyncckpt.integrations.lightning.agreement import Alone, Savers
from asyncckpt.integrations.lightning.directory_run import DirectoryRun
from asyncckpt.integrations.lightning.pointer import read_pointer
from asyncckpt.integrations.lightning.removal import Removal


class OpenRuns:
    """Saves into the run of whichever directory Lightning names, and removes from there. For the training thread.

    ``options``: what ``Checkpointer`` is given. ``savers``: who saves together; all of them make the same calls, but
    for ``remove``, which is the first one's."""

    def __init__(self, options: Mapping[str, Any], savers: Savers | None = None) -> None:
        self._options = options
        self._savers = savers or Alone()
        self._runs: dict[Path, DirectoryRun] = {}
        self._torch = TorchCheckpointIO()
        self._lock = threading.Lock()
        #: What Lightning has removed, and is still there because saves are in flight.
        self._removals: dict[Path, Removal] = {}

    def __getitem__(self, directory: Path) -> DirectoryRun:
        """Return the run of a directory that was saved into. Raises ``KeyError``."""
        return self._runs[directory]

    def save(
        self,
        path: str | os.PathLike[str],
        checkpoint: Mapping[str, Any],
        components: Mapping[str, Any],
        optimizers: Sequence[torch.optim.Optimizer],
        contents: Mapping[str, Any] | None = None,
    ) -> None:
        """Save ``components``, which were made of Lightning's ``checkpoint``, and have the file ``path`` name them.
        ``optimizers``: those whose tensors may be copied while training goes on. ``contents``: the values of the
        components, where live objects hold them. Blocks and raises as ``Checkpointer.save`` does; ``InvalidOption``
        for a path that is not local."""
        target = local_path(path)
        given = checkpoint.get("global_step")
        step = given if type(given) is int else None
        run = self._run_of(target.parent, step)
        with self._lock:
            self._removals.pop(target, None)
        run.watch(optimizers)
        epoch = checkpoint.get("epoch")
        run.save(
            target,
            step if step is not None else run.reached + 1,
            components,
            {"epoch": epoch} if type(epoch) is int else {},
            components if contents is None else contents,
        )

    def wait(self) -> None:
        """Block until every save has ended. Raises what failed in the background."""
        for run in self._runs.values():
            run.wait()

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, once the saves that are in flight are durable; not at all where one of them fails.
        Blocks where nothing is in flight: until the file is gone."""
        target = local_path(path)
        pointer = None if target.is_symlink() else read_pointer(target)
        run = self._runs.get(target.parent)
        is_of_run = run is not None and pointer is not None and run.folder == pointer.run
        if run is not None and pointer is not None and is_of_run:
            run.remove(pointer.name, run.in_flight())
        removal = Removal(target, None if is_of_run else pointer)
        with self._lock:
            self._removals[target] = removal
        removal.after([pending for one in self._runs.values() for pending in one.in_flight()], self._carry_out)

    def _carry_out(self, removal: Removal) -> None:
        with self._lock:
            if self._removals.get(removal.path) is not removal:  # saved anew meanwhile
                return
            del self._removals[removal.path]
            if removal.path.is_symlink():  # Lightning leaves one whose target is gone
                removal.path.unlink(missing_ok=True)
            else:
                self._torch.remove_checkpoint(removal.path)
        removal.delete_checkpoint()

    def close(self) -> None:
        """Wait for every save, and close the runs; the next save opens its run anew. Raises what failed in the
        background."""
        runs, self._runs = self._runs, {}
        with contextlib.ExitStack() as stack:  # each is closed, whatever the others raise
            for run in runs.values():
                stack.callback(run.close)

    def _run_of(self, directory: Path, step: int | None) -> DirectoryRun:
        run = self._runs.get(directory)
        if run is not None and step is not None and step < run.reached:
            self._runs.pop(directory).close()
            run = None
        if run is None:
            run = self._runs[directory] = DirectoryRun(directory, self._options, step, self._savers)
        return run


def is_local(path: str | os.PathLike[str]) -> bool:
    """Return whether the path is one of this machine's file systems."""
    return bool(_is_local_file_protocol(os.fspath(path)))


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return the path as an absolute one. Raises ``InvalidOption`` for one that is not local."""
    if not is_local(path):
        raise InvalidOption(f"{os.fspath(path)}: asyncckpt saves to local directories; give ModelCheckpoint one")
    return Path(os.path.abspath(path))
