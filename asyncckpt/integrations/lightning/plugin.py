"""``AsyncckptIO`` is Lightning's ``CheckpointIO`` over asyncckpt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from asyncckpt.assets import Assets
from asyncckpt.events import Subscriber
from asyncckpt.formats.options import Files, FilesName
from asyncckpt.integrations.lightning.loading import is_run, load_newest, load_pointed
from asyncckpt.integrations.lightning.pointer import read_pointer
from asyncckpt.integrations.lightning.runs import OpenRuns, is_local
from asyncckpt.integrations.lightning.stepping import SteppingOptimizers
from asyncckpt.integrations.lightning.translation import to_components
from asyncckpt.ranks.store import RankOptions
from asyncckpt.stage.options import StagingOptions
from asyncckpt.write.options import WriterOptions


class AsyncckptIO(CheckpointIO):
    """Saves what a ``Trainer`` saves in the background: ``Trainer(plugins=[AsyncckptIO()])``.

    All checkpoints of a directory go into one run, the folder ``asyncckpt-run`` in it. The ``.ckpt`` file that
    Lightning names is a small text file that says which checkpoint of the run is meant. It is there when the save
    returns, and a checkpoint that Lightning removes stays until those saved before the removal are durable. A
    checkpoint of plain Lightning is read as ever.

    The options are those of ``Checkpointer``. The strategies of this module, with which all ranks save, take them from
    here, and ``ranks`` is for these alone. For the training thread of rank 0; ``load_checkpoint`` for any rank.
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
        ranks: RankOptions | None = None,
    ) -> None:
        super().__init__()
        self._options: dict[str, Any] = {"files": files, "assets": assets, "config": config, "on_event": on_event}
        self._options |= {"staging": staging} if staging is not None else {}
        self._options |= {"writer": writer} if writer is not None else {}
        self.ranks = ranks or RankOptions()
        self._begin()

    def _begin(self) -> None:
        self._runs = OpenRuns(self._options)
        self._torch = TorchCheckpointIO()
        self._stepping = SteppingOptimizers()

    @property
    def options(self) -> dict[str, Any]:
        """What ``Checkpointer`` is given."""
        return dict(self._options)

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self._options, "ranks": self.ranks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._options, self.ranks = state["options"], state["ranks"]
        self._begin()

    # -- what Lightning calls ----------------------------------------------------------------------------------------

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Save in the background, and have the file ``path`` name the checkpoint. Blocks and raises as
        ``Checkpointer.save`` does; the first save of a run blocks until it is durable."""
        if storage_options is not None:
            raise TypeError("AsyncckptIO takes no storage_options: give AsyncckptIO(writer=WriterOptions(…))")
        optimizers = self._stepping.owners_of(checkpoint.get("optimizer_states"))
        self._stepping.listen()
        self._runs.save(path, checkpoint, to_components(checkpoint), optimizers)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return what was saved: every byte is verified, and nothing is unpickled, whatever ``weights_only`` says.
        Tensors are on the CPU, or where ``map_location`` says, if that is a device. Waits for saves in flight.

        Where a crash has kept the newest ``last*.ckpt`` from being finished, the checkpoint before it is returned, and
        a warning says so; ``path`` may be a run, too, which means its newest checkpoint that verifies. A file of plain
        Lightning is given to ``torch.load``, with ``weights_only``. Raises
        ``FileNotFoundError``, ``CheckpointNotFound``, ``CheckpointDamaged`` and ``RunPathError``."""
        self._runs.wait()
        device = map_location if isinstance(map_location, str | torch.device) else "cpu"
        if is_local(path) and is_run(Path(path)):
            return load_newest(Path(path), device)
        pointer = read_pointer(Path(path)) if is_local(path) else None
        if pointer is None:
            kwargs = {} if map_location is None else {"map_location": map_location}
            return self._torch.load_checkpoint(os.fspath(path), weights_only=weights_only, **kwargs)
        return load_pointed(Path(path), pointer, device)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, once the saves that are in flight are durable; not at all where one of them fails.
        Blocks where nothing is in flight: until the file is gone."""
        self._runs.remove(path)

    def teardown(self) -> None:
        """Wait for every save, and close the runs; the next save opens its run anew. Raises what failed in the
        background."""
        self._stepping.stop()
        self._runs.close()
