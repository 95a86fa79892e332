"""``AsyncckptIO`` is Lightning's ``CheckpointIO`` over asyncckpt."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from asyncckpt.assets import Assets
from asyncckpt.errors import InvalidOption
from asyncckpt.events import Subscriber
from asyncckpt.formats.options import Files, FilesName
from asyncckpt.integrations.lightning.directory_run import DirectoryRun
from asyncckpt.integrations.lightning.loading import is_run, load_newest, load_pointed
from asyncckpt.integrations.lightning.pointer import read_pointer
from asyncckpt.integrations.lightning.removal import Removal
from asyncckpt.integrations.lightning.stepping import SteppingOptimizers
from asyncckpt.integrations.lightning.translation import to_components
from asyncckpt.stage.options import StagingOptions
from asyncckpt.write.options import WriterOptions


class AsyncckptIO(CheckpointIO):
    """Saves what a ``Trainer`` saves in the background: ``Trainer(plugins=[AsyncckptIO()])``.

    All checkpoints of a directory go into one run, the folder ``asyncckpt-run`` in it. The ``.ckpt`` file that
    Lightning names is a small text file that says which checkpoint of the run is meant. It is there when the save
    returns, and a checkpoint that Lightning removes stays until those saved before the removal are durable. A
    checkpoint of plain Lightning is read as ever.

    The options are those of ``Checkpointer``. For the training thread of rank 0; ``load_checkpoint`` for any rank.
    Pickled, it keeps its options alone. Errors of background saves are raised by the next save, or by ``teardown``,
    which the Trainer calls at the end of ``fit``. Raises ``InvalidOption``.
    """

    def __init__(
        self,
        *,
        files: Files | FilesName = "safetensors",
        staging: StagingOptions | None = None,
        writer: WriterOptions | None = None,
        assets: Assets = (),
        config: Any = None,
        on_event: Subscriber | tuple[Subscriber, ...] = (),
    ) -> None:
        super().__init__()
        self._options: dict[str, Any] = {"files": files, "assets": assets, "config": config, "on_event": on_event}
        self._options |= {"staging": staging} if staging is not None else {}
        self._options |= {"writer": writer} if writer is not None else {}
        self._begin()

    def _begin(self) -> None:
        self._runs: dict[Path, DirectoryRun] = {}
        self._torch = TorchCheckpointIO()
        self._lock = threading.Lock()
        self._stepping = SteppingOptimizers()
        #: What Lightning has removed, and is still there because saves are in flight.
        self._removals: dict[Path, Removal] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._options = state["options"]
        self._begin()

    # -- what Lightning calls ----------------------------------------------------------------------------------------

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Save in the background, and have the file ``path`` name the checkpoint. Blocks and raises as
        ``Checkpointer.save`` does; the first save of a run blocks until it is durable."""
        if storage_options is not None:
            raise TypeError("AsyncckptIO takes no storage_options: give AsyncckptIO(writer=WriterOptions(…))")
        target = _local(path)
        step = checkpoint.get("global_step")
        run = self._run_of(target.parent, step if type(step) is int else None)
        with self._lock:
            self._removals.pop(target, None)
        run.watch(self._stepping.owners_of(checkpoint.get("optimizer_states")))
        self._stepping.listen()
        epoch = checkpoint.get("epoch")
        run.save(
            target,
            step if type(step) is int else run.reached + 1,
            to_components(checkpoint),
            {"epoch": epoch} if type(epoch) is int else {},
        )

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return what was saved: every byte is verified, and nothing is unpickled, whatever ``weights_only`` says.
        Tensors are on the CPU, or where ``map_location`` says, if that is a device. Waits for saves in flight.

        Where a crash has kept the newest ``last*.ckpt`` from being finished, the checkpoint before it is returned, and
        a warning says so; ``path`` may be a run, too, which means its newest checkpoint that verifies. A file of plain
        Lightning is given to ``torch.load``, with ``weights_only``. Raises
        ``FileNotFoundError``, ``CheckpointNotFound``, ``CheckpointDamaged`` and ``RunPathError``."""
        for run in self._runs.values():
            run.wait()
        device = map_location if isinstance(map_location, str | torch.device) else "cpu"
        is_local = _is_local_file_protocol(os.fspath(path))
        if is_local and is_run(Path(path)):
            return load_newest(Path(path), device)
        pointer = read_pointer(Path(path)) if is_local else None
        if pointer is None:
            kwargs = {} if map_location is None else {"map_location": map_location}
            return self._torch.load_checkpoint(os.fspath(path), weights_only=weights_only, **kwargs)
        return load_pointed(Path(path), pointer, device)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, once the saves that are in flight are durable; not at all where one of them fails.
        Blocks where nothing is in flight: until the file is gone."""
        target = _local(path)
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

    def teardown(self) -> None:
        """Wait for every save, and close the runs; the next save opens its run anew. Raises what failed in the
        background."""
        self._stepping.stop()
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
            run = self._runs[directory] = DirectoryRun(directory, self._options, step)
        return run


def _local(path: str | os.PathLike[str]) -> Path:
    if not _is_local_file_protocol(os.fspath(path)):
        raise InvalidOption(f"{os.fspath(path)}: AsyncckptIO saves to local directories; give ModelCheckpoint one")
    return Path(os.path.abspath(path))
