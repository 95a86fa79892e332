"""``AsyncState(accelerator, path)`` saves and loads what ``Accelerator.save_state`` and ``load_state`` do, in the
background and into one run. See docs/trainers/accelerate.md."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsIndex

import torch
from torch.utils.data import RandomSampler

from asyncckpt.checkpointer import Checkpointer
from asyncckpt.commit.pending import PendingSave
from asyncckpt.errors import CheckpointNotFound, InvalidOption, MissingExtra
from asyncckpt.ownership import RunOptions
from asyncckpt.state.rng import RngState

try:
    from accelerate import Accelerator
    from accelerate.data_loader import SeedableRandomSampler
    from accelerate.utils import DistributedType
except ImportError as error:
    if (error.name or "").partition(".")[0] != "accelerate":
        raise
    raise MissingExtra("asyncckpt.integrations.accelerate needs accelerate: pip install 'asyncckpt[accelerate]'") from (
        error
    )

log = logging.getLogger("asyncckpt")


class AsyncState:
    """The training state of an ``Accelerator``, saved in the background: ``state = AsyncState(accelerator, "run")``,
    then ``state.save_state(step)`` in the place of ``accelerator.save_state(folder)``, and ``state.load_state()``.

    A checkpoint has every prepared model, optimizer and scheduler, what was given to ``register_for_checkpointing``,
    the GradScaler, the epoch and the seed of each prepared loader (all of a stateful one's position), the count of
    accumulated batches, and the random generators of each rank. Optimizers are watched through their wrappers.

    ``path``: the run, a directory of its own. ``options``: those of ``Checkpointer`` (``keep``, ``files``, …). Make it
    after ``prepare``, on every process; every process makes the same calls. Use it in a ``with`` block, or call
    ``close``. For the training thread. Raises ``InvalidOption`` where Accelerate shards in a way of its own
    (DeepSpeed, Megatron-LM, FSDP 1), and where ``path`` is what ``automatic_checkpoint_naming`` counts and deletes.
    """

    def __init__(self, accelerator: Accelerator, path: str | os.PathLike[str], **options: Any) -> None:
        _check_strategy(accelerator)
        _check_path(accelerator, path)
        self._accelerator = accelerator
        self.checkpointer = Checkpointer(path, **{"run": RunOptions(create_parents=True), **options})
        self._saved = -1
        self._watched: set[int] = set()
        self._warned = False
        #: The random generators as the last ``load_state`` has left them.
        self._rng: dict[str, Any] | None = None

    def save_state(
        self,
        step: SupportsIndex | None = None,
        *,
        metrics: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> PendingSave:
        """Save now, and return once training may go on. ``step``: the training step; None counts the saves of the run,
        from 1. ``metrics``, ``name``: see ``Checkpointer.save``, which this blocks and raises as. ``InvalidOption``
        also where hooks are registered with ``register_save_state_pre_hook``: they write files of their own."""
        if self._accelerator._save_model_state_pre_hook:
            raise InvalidOption(
                "save_state: hooks of register_save_state_pre_hook write into a folder that there is none of here. "
                "Remove them, and give what they write to AsyncState(assets=…) or to register_for_checkpointing"
            )
        state = self._state()
        if step is None:
            step = (self._saved if self._saved >= 0 else max(self._newest(), 0)) + 1
        pending = self.checkpointer.save(step, state, metrics=metrics, name=name)
        self._saved = pending.step
        return pending

    def load_state(self, step: int | str | None = None) -> int:
        """Load a checkpoint into the prepared objects, in place, and return its step. ``step``: a step or a name; None
        takes the newest that verifies, and returns 0, having changed nothing, where the run has none. Blocks for the
        whole read. Raises as ``Checkpointer.resume`` and ``restore`` do."""
        state = self._state()
        if step is None:
            found = self.checkpointer.resume(state)
        else:
            found = self.checkpointer.restore(state, step).step
        self._rng = RngState().state_dict()
        self._saved = found
        return found

    def skip_first_batches(self, loader: Any, count: int) -> Any:
        """Return what ``accelerator.skip_first_batches`` does, to go on in the middle of an epoch after ``load_state``.
        Making an iterator draws random numbers, which an unbroken training would not do there: so the generators are
        set again, to where ``load_state`` has set them, once the first batch is there."""
        if not count:
            return loader
        skipping = self._accelerator.skip_first_batches(loader, count)
        return skipping if self._rng is None else _GoesOn(skipping, self._rng)

    def export(self, folder: str | os.PathLike[str], step: int | str | None = None) -> None:
        """Load a checkpoint, and have Accelerate save it into ``folder``, from where plain ``load_state`` goes on. What
        is prepared is overwritten by it. Raises ``CheckpointNotFound`` where there is none, and as ``load_state``
        does."""
        if step is None and self._newest() < 0:
            raise CheckpointNotFound(f"{self.checkpointer.path}: there is no checkpoint to export")
        self.load_state(step)
        if self._accelerator.project_configuration.automatic_checkpoint_naming:
            raise InvalidOption(
                "export: with automatic_checkpoint_naming, Accelerate would choose the folder; unset it"
            )
        self._accelerator.save_state(os.fspath(folder))

    def wait(self) -> None:
        """Block until every save is durable. Raises what failed in the background."""
        self.checkpointer.wait()

    def close(self) -> None:
        """Wait for every save, and give the directory back. Raises what failed in the background. Idempotent."""
        self.checkpointer.close()

    def __enter__(self) -> Self:
        self.checkpointer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.checkpointer.__exit__(kind, error, traceback)

    def _newest(self) -> int:
        try:
            return self.checkpointer.newest().step
        except CheckpointNotFound:
            return -1

    def _state(self) -> dict[str, Any]:
        """Return the components, and watch the optimizers that are prepared by now."""
        accelerator = self._accelerator
        optimizers = [getattr(one, "optimizer", one) for one in accelerator._optimizers]
        state: dict[str, Any] = {}
        state |= _numbered("model", accelerator._models)
        state |= _numbered("optimizer", optimizers)
        state |= _numbered("scheduler", accelerator._schedulers)
        state |= _numbered("loader", [LoaderState(one) for one in accelerator._dataloaders])
        state |= _numbered("registered", accelerator._custom_objects)
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler
        state["accelerator"] = AcceleratorState(accelerator)
        state["rng"] = RngState()
        for optimizer in optimizers:
            if id(optimizer) not in self._watched:
                self._watched.add(id(optimizer))
                self.checkpointer.watch(optimizer)
        if not self._warned and any(not LoaderState(one).is_repeatable() for one in accelerator._dataloaders):
            self._warned = True
            log.warning(
                "AsyncState: a prepared DataLoader shuffles in an order that Accelerate cannot repeat in the middle of "
                "an epoch; use DataLoaderConfiguration(use_seedable_sampler=True) or a stateful loader"
            )
        return state


class _GoesOn:
    """Gives the batches of a loader, once, and sets the random generators when the first is there."""

    def __init__(self, loader: Any, rng: Mapping[str, Any]) -> None:
        self._loader = loader
        self._rng = rng

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self._loader):
            if index == 0:
                RngState().load_state_dict(self._rng)
            yield batch


class LoaderState:
    """What has to come back of a prepared loader: its epoch, its sampler's seed, and the position of a stateful one."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def _sampler(self) -> Any:
        find = getattr(self._loader, "get_sampler", None)
        return find() if find is not None else None

    def is_repeatable(self) -> bool:
        """Return whether an epoch that was left has the same order again."""
        shuffles_anew = isinstance(self._sampler(), RandomSampler) and not isinstance(
            self._sampler(), SeedableRandomSampler
        )
        return not shuffles_anew or bool(getattr(self._loader, "use_stateful_dataloader", False))

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        state: dict[str, Any] = {"iteration": int(getattr(self._loader, "iteration", 0))}
        sampler = self._sampler()
        if isinstance(sampler, SeedableRandomSampler):
            state["sampler"] = {"epoch": sampler.epoch, "initial_seed": sampler.initial_seed}
        generator = getattr(self._loader, "synchronized_generator", None)
        if isinstance(generator, torch.Generator):
            state["generator"] = generator.get_state().numpy().tobytes()
        if getattr(self._loader, "use_stateful_dataloader", False):
            state["position"] = self._loader.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring the loader to this state."""
        if hasattr(self._loader, "iteration"):
            self._loader.iteration = state["iteration"]
        sampler = self._sampler()
        if isinstance(sampler, SeedableRandomSampler) and "sampler" in state:
            sampler.epoch, sampler.initial_seed = state["sampler"]["epoch"], state["sampler"]["initial_seed"]
        generator = getattr(self._loader, "synchronized_generator", None)
        if isinstance(generator, torch.Generator) and "generator" in state:
            generator.set_state(torch.frombuffer(bytearray(state["generator"]), dtype=torch.uint8))
        if "position" in state and getattr(self._loader, "use_stateful_dataloader", False):
            self._loader.load_state_dict(state["position"])


class AcceleratorState:
    """What has to come back of the accelerator itself: the batches of an accumulation that is not finished."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {"step": self._accelerator.step, "iteration": self._accelerator.project_configuration.iteration}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring the accelerator to this state."""
        self._accelerator.step = state["step"]
        self._accelerator.project_configuration.iteration = state["iteration"]


def _numbered(name: str, objects: list[Any]) -> dict[str, Any]:
    """Return the objects by the names that Accelerate gives to files: ``model``, ``model_1``, …"""
    return {name if index == 0 else f"{name}_{index}": value for index, value in enumerate(objects)}


def _check_strategy(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    plugin = accelerator.state.fsdp_plugin if kind == DistributedType.FSDP else None
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA) or (
        plugin is not None and plugin.fsdp_version != 2
    ):
        raise InvalidOption(
            f"AsyncState: {kind.value} keeps its state in ways of its own; use accelerator.save_state there, or FSDP "
            f"with fsdp_version=2"
        )


def _check_path(accelerator: Accelerator, path: str | os.PathLike[str]) -> None:
    configuration = accelerator.project_configuration
    if not configuration.automatic_checkpoint_naming or not accelerator.project_dir:
        return
    counted = Path(os.path.realpath(accelerator.project_dir)) / "checkpoints"
    given = Path(os.path.realpath(path))
    if given == counted or counted in given.parents:
        raise InvalidOption(
            f"{given}: with automatic_checkpoint_naming, Accelerate counts and deletes whatever is in {counted}; give "
            f"AsyncState a directory beside it"
        )
