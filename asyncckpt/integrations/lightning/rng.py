"""A callback for a ``Trainer`` that brings random numbers back, which Lightning's checkpoints do not hold."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from asyncckpt.state.rng import RngState


class RandomState(Callback):
    """Has a checkpoint hold the state of the random generators, which Lightning leaves out, and brings it back: dropout
    and shuffling then go on as in an unbroken training. In a job of several ranks it does nothing, unless the strategy
    is one of asyncckpt's: then each rank has its own.

    A ``DataLoader`` that is resumed in the middle of an epoch begins that epoch anew, in Lightning, unless it has
    ``state_dict`` (as torchdata's ``StatefulDataLoader`` has).
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._ranks = 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._ranks = trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        return RngState().state_dict() if self._ranks == 1 else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict if self._ranks == 1 and state_dict else None

    def on_restored(self) -> None:
        """Called by a strategy that has restored the generators of this rank: what Lightning draws from them before it
        goes on in the middle of an epoch will not count."""
        self._loaded = RngState().state_dict()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0:  # making the iterator has drawn numbers, which an epoch that goes on does not
            self._restore()
        self._loaded = None

    def _restore(self) -> None:
        if self._loaded is not None:
            RngState().load_state_dict(self._loaded)
