"""Callbacks for a ``Trainer``: one that saves when asyncckpt's cadence says so, and one that brings random numbers
back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from asyncckpt.catalog.retention import Policy
from asyncckpt.checkpointer import Checkpointer
from asyncckpt.errors import CheckpointNotFound, InvalidOption
from asyncckpt.integrations.lightning.plugin import AsyncckptIO
from asyncckpt.integrations.lightning.strategy import SavesOnAllRanks
from asyncckpt.integrations.lightning.translation import to_components
from asyncckpt.loop.cadence import Every
from asyncckpt.ownership import RunOptions
from asyncckpt.run import Run
from asyncckpt.state.markers import Owner

_SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


class AsyncckptCallback(Checkpoint):
    """Saves the whole training state into the run ``path`` when ``every`` says so, in the place of ``ModelCheckpoint``:
    ``Trainer(callbacks=[AsyncckptCallback("gpt-run", every=100, keep=KeepLast(3))])``.

    ``trainer.fit(model, ckpt_path=callback.newest())`` resumes. ``every`` counts ``trainer.global_step``; ``keep`` and
    ``options`` (``preemption``, ``files``, ``staging``, …) are those of ``Checkpointer``. Metrics that were logged are
    those of the checkpoint. In a job of several ranks all of them write each checkpoint together. Where the Trainer has
    no other ``CheckpointIO``, it gets ``AsyncckptIO``, so that it can read the run. Raises as ``Checkpointer`` does:
    errors of background saves come with the next step, or at the end of ``fit``; and ``InvalidOption`` under a strategy
    that shards, which Lightning resumes past any plugin, unless it is one of asyncckpt's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        every: Every,
        keep: Policy | Sequence[Policy] = (),
        **options: Any,
    ) -> None:
        super().__init__()
        self.path = os.fspath(path)
        self._options = {"run": RunOptions(create_parents=True), **options, "every": every, "keep": keep}
        self._checkpointer: Checkpointer | None = None
        self._step = -1

    def newest(self) -> str | None:
        """Return what ``fit(ckpt_path=…)`` takes to resume the newest checkpoint that verifies: the run's path, or None
        where it has no checkpoint. Blocks on the disk."""
        try:
            Run(self.path).newest()
        except CheckpointNotFound:
            return None
        return self.path

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checkpointer": None}

    # -- what Lightning calls ----------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, _SHARDING) and not isinstance(trainer.strategy, SavesOnAllRanks):
            raise InvalidOption(
                f"AsyncckptCallback: {type(trainer.strategy).__name__} reads checkpoints past any plugin, so what is "
                f"saved here could not be resumed; use AsyncckptModelParallelStrategy or AsyncckptFSDPStrategy, or "
                f"ModelCheckpoint"
            )
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AsyncckptIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._checkpointer = Checkpointer(self.path, **self._options)
        self._checkpointer.watch(*trainer.optimizers)
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if self._checkpointer is None or trainer.global_step == self._step:  # gradients are accumulated still
            return
        self._step = trainer.global_step
        self._checkpointer.step(self._step, _StateOf(trainer), _Metrics(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            self._close()
        except Exception as background:  # it must not hide what has ended the training
            exception.add_note(f"asyncckpt: a background save failed too: {background}")

    def _close(self) -> None:
        checkpointer, self._checkpointer = self._checkpointer, None
        if checkpointer is not None:
            checkpointer.close()


class _StateOf(Mapping[str, Any]):
    """The components of a checkpoint, which are asked of the trainer only once somebody looks at them."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._components: dict[str, Any] | None = None

    def _found(self) -> dict[str, Any]:
        if self._components is None:
            checkpoint = self._trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            if isinstance(self._trainer.strategy, SavesOnAllRanks):
                self._components = self._trainer.strategy.components(checkpoint)
                return self._components
            components = to_components(checkpoint)
            if self._trainer.world_size > 1:  # progress and metrics are rank 0's, as in Lightning's own checkpoints
                components["lightning"] = Owner(components["lightning"], rank=0)
            self._components = components
        return self._components

    def __getitem__(self, key: str) -> Any:
        return self._found()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())


class _Metrics(Mapping[str, Any]):
    """The numbers that were logged, which are read only once somebody looks at them: that may wait for a device."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def _found(self) -> dict[str, Any]:
        logged = self._trainer.callback_metrics
        numbers = {name: value for name, value in logged.items() if getattr(value, "numel", lambda: 1)() == 1}
        return {"epoch": self._trainer.current_epoch, **numbers}

    def __getitem__(self, key: str) -> Any:
        return self._found()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())
