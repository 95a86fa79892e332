"""``AsyncckptManager`` has torchtitan's trainer save through asyncckpt. See docs/trainers/torchtitan.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.catalog.retention import KeepLast, checked_policies
from asyncckpt.checkpointer import Checkpointer
from asyncckpt.commit.pending import PendingSave
from asyncckpt.errors import InvalidOption, MissingExtra
from asyncckpt.ownership import RunOptions
from asyncckpt.run import Run
from asyncckpt.state.markers import Owner

try:
    from torchtitan.components.checkpointer import CheckpointManager
    from torchtitan.components.checkpointer.base import DATALOADER, MODEL, OPTIMIZER
except ImportError as error:
    if (error.name or "").partition(".")[0] not in ("torchtitan", "triton"):
        raise
    raise MissingExtra(
        f"asyncckpt.integrations.torchtitan needs torchtitan and triton ({error}): pip install 'asyncckpt[torchtitan]'"
    ) from error

#: The names of checkpoints' directories are torchtitan's.
NAME = "step-{step}"


class AsyncckptManager(CheckpointManager):  # type: ignore[misc]
    """torchtitan's checkpoint manager over asyncckpt: ``config.checkpoint = AsyncckptManager.Config(enable=True, …)``.

    ``Config`` means what it means (``folder``, ``interval``, ``keep_latest_k``, ``exclude_from_loading``, …), and has
    ``options``, more of those of ``Checkpointer``. A checkpoint has each part of the model, each optimizer, the
    schedules, the data loader of each rank and the trainer's own state. A save goes on while training does;
    ``maybe_wait_for_staging`` blocks until it is copied. Checkpoints of plain torchtitan are loaded as ever, and never
    deleted. ``close`` waits for every save. Errors of background saves are raised by the next save, and by ``close``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):  # type: ignore[misc]
        options: dict[str, Any] = field(default_factory=dict)
        """More options for ``asyncckpt.Checkpointer``, by name."""

    def __init__(self, config: Any, **given: Any) -> None:
        if config.async_mode != "disabled":
            raise InvalidOption(
                f"async_mode={config.async_mode!r} is for DCP; AsyncckptManager always saves so: leave it out"
            )
        keep = [KeepLast(config.keep_latest_k)] if config.keep_latest_k else []
        # torchtitan's own thread would delete directories itself
        self.save_future: Future[None] | None
        super().__init__(replace(config, keep_latest_k=0), **given)
        if not self.enable:
            return
        self._parts = given["model_parts"]
        self._dataloader = given["dataloader"]
        self._options = dict(config.options)
        self._pending: PendingSave | None = None
        self._keep = [*keep, *checked_policies(self._options.pop("keep", ()))]
        self._checkpointer: Checkpointer | None = None

    # -- what torchtitan calls ---------------------------------------------------------------------------------------

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        """Save in the background; the last step's is durable on return. Raises as ``Checkpointer.save`` does."""
        if not self._should_save(curr_step, last_step):
            return False
        if last_step and self.last_save_in_hf:
            self._opened().wait()
            self._save_last_step(curr_step)
            return True
        if last_step and self.last_save_model_only:
            exported = {name: _Exported(part, self.export_dtype) for name, part in _numbered(MODEL, self._parts)}
            self._opened().save(curr_step, exported, weights_only=True).result()
            self._opened().wait()
            return True
        pending = self._pending = self._opened().save(curr_step, self._state())
        future: Future[None] = Future()
        self.save_future = future
        pending.add_done_callback(self._settle(future))
        if last_step:
            self._opened().wait()
        return True

    def _load(self, step: int = -1) -> bool:
        """Restore the newest checkpoint that verifies, or that of ``step``. Blocks for the whole read. Raises as
        ``Checkpointer.resume`` and ``restore`` do, and as torchtitan does where it finds none of this library."""
        there = [one for one in self._entries() if step in (-1, one.step)]
        if not there:
            return bool(super()._load(step))
        unknown = [name for name in self.exclude_from_loading if name not in self.states]
        if unknown:
            raise ValueError(f"{unknown[0]} not found in state_dict.")
        full = [one for one in there if one.kind == "full"]
        if not full or full[-1].step == 0:
            self._opened().restore(dict(_numbered(MODEL, self._parts)), there[-1].step)
        elif step == -1 and not self.exclude_from_loading:
            self._opened().resume(self._state())
        else:
            self._opened().restore(self._state(self.exclude_from_loading), full[-1].step)
        return True

    def _maybe_wait_for_staging(self) -> None:
        if self._pending is not None:
            self._pending.staged()
            self._pending = None

    def _wait_for_saving(self) -> None:
        self.save_future = None
        self._opened().wait()

    def _close(self) -> None:
        checkpointer = getattr(self, "_checkpointer", None)
        if checkpointer is not None:
            self._checkpointer = None
            checkpointer.close()

    # -- the state ---------------------------------------------------------------------------------------------------

    def _state(self, excluded: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
        """Return the components. What torchtitan takes for the same on all ranks is rank 0's, as with DCP."""
        state: dict[str, Any] = dict(_numbered(MODEL, self._parts))
        if OPTIMIZER not in excluded:
            state |= dict(_numbered(OPTIMIZER, self.states[OPTIMIZER].optimizers))
        if self._dataloader is not None and DATALOADER not in excluded:
            state[DATALOADER] = self._dataloader
        own = (MODEL, OPTIMIZER, DATALOADER)
        others = {name: value for name, value in self.states.items() if name not in (*own, *excluded)}
        return state | {name: Owner(value) for name, value in others.items() if value is not None}

    def _entries(self) -> list[CheckpointInfo]:
        """List the checkpoints of this library in the folder."""
        return [one for one in Run(self.folder).ls() if not one.renamed] if os.path.isdir(self.folder) else []

    def _opened(self) -> Checkpointer:
        if self._checkpointer is None:
            run = replace(self._options.pop("run", RunOptions()), name=NAME, create_parents=True)
            self._checkpointer = Checkpointer(self.folder, keep=self._keep, run=run, **self._options)
            self._checkpointer.watch(*self.states[OPTIMIZER].optimizers)
        return self._checkpointer

    @staticmethod
    def _settle(future: Future[None]) -> Any:
        def settle(done: PendingSave) -> None:
            error = done.failure()
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        return settle


class _Exported(nn.Module):
    """Is a module whose ``state_dict`` has floating-point values in the dtype that they are exported in."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self._dtype = dtype

    @torch.no_grad()
    def state_dict(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {
            name: value.to(self._dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in self.module.state_dict().items()
        }


def _numbered(name: str, objects: list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the objects with their names: ``model``, ``model_1``, …, one for each stage of a pipeline on this rank."""
    for index, value in enumerate(objects):
        yield (name if index == 0 else f"{name}_{index}"), value
