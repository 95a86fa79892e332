"""Strategies of Lightning with which every rank saves its part of each checkpoint through asyncckpt."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn

from asyncckpt.checkpointer import Checkpointer
from asyncckpt.errors import InvalidOption, StateMismatch
from asyncckpt.integrations.lightning.agreement import RanksOf
from asyncckpt.integrations.lightning.live_state import LiveState, refused
from asyncckpt.integrations.lightning.loading import Saved, find_saved
from asyncckpt.integrations.lightning.plugin import AsyncckptIO
from asyncckpt.integrations.lightning.rng import RandomState
from asyncckpt.integrations.lightning.runs import OpenRuns, is_local
from asyncckpt.integrations.lightning.trainer_part import TrainerPart, is_equal
from asyncckpt.integrations.lightning.translation import (
    live_components,
    numbered_optimizers,
    positions_in_data,
    set_positions_in_data,
    trainer_part,
)
from asyncckpt.state.fsdp1 import is_fsdp1
from asyncckpt.state.markers import Owner, PerRank
from asyncckpt.state.rng import RngState

#: The components that each rank has of its own: its random generators, and its positions in data.
_RNG, _LOADERS = "rng", "loaders"


class SavesOnAllRanks(ParallelStrategy):
    """Has a strategy save the live model and optimizers through asyncckpt, every rank its part, and restore them in
    place. It goes before the strategy among the bases of a class."""

    _open_runs: OpenRuns | None = None

    # -- what Lightning calls to save --------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> Any:
        """Return what stands for the weights in the dictionary that Lightning makes; no values are copied."""
        return LiveState("state_dict", self._weights)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return what stands for an optimizer's state in the dictionary that Lightning makes."""
        found = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return LiveState("optimizer_states", found.state_dict)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Save in the background, all ranks together, and have the file ``filepath`` name the checkpoint. Blocks and
        raises as ``Checkpointer.save`` does; the first save of a run blocks until it is durable. ``InvalidOption``
        where a hook has changed the weights, or the states of optimizers, in ``checkpoint``."""
        if storage_options is not None:
            raise TypeError(
                f"{type(self).__name__} takes no storage_options: give AsyncckptIO(writer=WriterOptions(…))"
            )
        path = self.broadcast(os.fspath(filepath))
        components = self.components(checkpoint)
        optimizers = self.optimizers if "optimizer_states" in checkpoint else []
        contents = {
            "model": [dict(components["model"].named_parameters()), dict(components["model"].named_buffers())],
            "optimizer": [[list(one.state.values()), one.param_groups] for one in optimizers],
            "lightning": components["lightning"].value.value,
        }
        self._runs().save(path, checkpoint, components, optimizers, contents)

    def components(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state to save of what Lightning has dumped. Raises ``InvalidOption`` as ``save_checkpoint``
        does."""
        given = [("state_dict", checkpoint.get("state_dict"))]
        given += [("optimizer_states", one) for one in checkpoint.get("optimizer_states", [])]
        for what, value in given:
            if not isinstance(value, LiveState):
                raise refused(what)
            value.check_unchanged()
        assert self.model is not None
        optimizers = self.optimizers if "optimizer_states" in checkpoint else []
        components = live_components(checkpoint, self.model, optimizers)
        # progress and callbacks are rank 0's, as in Lightning's own checkpoints
        components["lightning"] = Owner(TrainerPart(components["lightning"]), rank=0)
        if optimizers and self._random_states():
            components[_RNG] = RngState()
        positions = positions_in_data(checkpoint)
        if positions:
            components[_LOADERS] = PerRank(TrainerPart({"states": positions}), _same_position)
        return components

    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, once the saves that are in flight are durable. Only rank 0 does."""
        if self.is_global_zero:
            self._runs().remove(filepath)

    def teardown(self) -> None:
        """Wait for every save, and close the runs. Raises what failed in the background."""
        try:
            if self._open_runs is not None:
                self._open_runs.close()
        finally:
            super().teardown()

    # -- what Lightning calls to resume ------------------------------------------------------------------------------

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Restore the model, and where it is trained the optimizers, in place; return what else Lightning has saved.
        Every rank reads the rows that it has, and every byte is verified; the number of ranks may be another one.

        ``checkpoint_path``: as ``AsyncckptIO.load_checkpoint`` takes it. One of plain Lightning is read by the strategy
        itself, which alone looks at ``weights_only``. Waits for saves in flight. Raises as ``Checkpointer.restore``
        does, and ``InvalidOption`` where the checkpoint was saved by another strategy."""
        self._runs().wait()
        given: str = self.broadcast(os.fspath(checkpoint_path))
        path = Path(given)
        saved = self._ranks().by_first(lambda: find_saved(path)) if is_local(given) else None
        if saved is None:
            return super().load_checkpoint(given, weights_only)
        if saved.kinds and saved.kinds.get("model") != "module":
            return self._load_of_one_rank(path)
        return self._restored(saved, str(path))

    def _load_of_one_rank(self, path: Path) -> dict[str, Any]:
        """Load what rank 0 has saved in whole, through ``AsyncckptIO``."""
        raise InvalidOption(
            f"{path}: a strategy that does not shard has saved this. Export it (python -m "
            f"asyncckpt.integrations.lightning {path} exported.ckpt) and resume from the file"
        )

    def _restored(self, saved: Saved, where: str) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None
        assert self.model is not None
        fits = module.trainer.state.fn == TrainerFn.FITTING
        optimizers = numbered_optimizers(self.optimizers) if fits else {}
        surplus = [name for name in saved.kinds if name.startswith("optimizer") and name not in optimizers]
        if fits and surplus:
            raise StateMismatch(
                f"{where}: it has {', '.join(surplus)}, and configure_optimizers gives {len(optimizers)}. Nothing was "
                f"restored: configure as many optimizers as were saved"
            )
        rest = TrainerPart(None)
        state: dict[str, Any] = {"model": self.model, **optimizers, "lightning": Owner(rest, rank=0)}
        random_states = self._random_states() if fits and _RNG in saved.kinds else []
        if random_states:
            state[_RNG] = RngState()
        positions = TrainerPart(None)
        if fits and _LOADERS in saved.kinds:
            state[_LOADERS] = PerRank(positions, _same_position)
        checkpointer = Checkpointer(saved.run, ranks=self._ranks().options, on_event=self._io().options["on_event"])
        try:
            report = checkpointer.restore(state, saved.name, strict=module.strict_loading)
        finally:
            checkpointer.close()
        odd = [one for one in (*report.missing, *report.unexpected, *report.mismatched) if not one.startswith("model.")]
        if odd:
            raise StateMismatch(
                f"{where}: strict_loading=False is for the model, and these do not fit either: {', '.join(odd[:10])}. "
                f"The model was restored",
                report.missing,
                report.unexpected,
                report.mismatched,
            )
        for one in random_states:
            one.on_restored()
        checkpoint = trainer_part(rest.state_dict(), where)
        if positions.value is not None:
            set_positions_in_data(checkpoint, positions.value["states"])
        return checkpoint

    # -- within ------------------------------------------------------------------------------------------------------

    def _runs(self) -> OpenRuns:
        if self._open_runs is None:
            self._open_runs = OpenRuns(self._io().options, self._ranks())
        return self._open_runs

    def _ranks(self) -> RanksOf:
        return RanksOf(self, self._io().ranks)

    def _io(self) -> AsyncckptIO:
        given = self._checkpoint_io
        return given if isinstance(given, AsyncckptIO) else AsyncckptIO()

    def _random_states(self) -> list[RandomState]:
        assert self.lightning_module is not None
        trainer: Any = self.lightning_module.trainer
        return [one for one in trainer.callbacks if isinstance(one, RandomState)]

    def _weights(self) -> Any:
        assert self.model is not None
        assert self.lightning_module is not None
        if is_fsdp1(self.model):
            raise InvalidOption(
                "checkpoint['state_dict'] has no values here: FSDP 1 would gather them on all ranks. Look at the "
                "module's parameters instead"
            )
        return self.lightning_module.state_dict()


def _same_position(states: list[Any], rank: int, size: int) -> Any:
    """Return what any rank of a job of another size takes over of the positions in data: what all ranks had."""
    if any(not is_equal(one, states[0]) for one in states):
        raise InvalidOption(
            f"{len(states)} ranks were each at another place in their data, and rank {rank} of {size} can take over "
            f"none of these. Resume with {len(states)} ranks, or from an export of the checkpoint, which has rank 0's "
            f"place for all"
        )
    return states[0]


class AsyncckptModelParallelStrategy(SavesOnAllRanks, ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` (FSDP2, tensor parallelism), which takes the same arguments:
    ``Trainer(strategy=AsyncckptModelParallelStrategy(data_parallel_size=…))``.

    ``ModelCheckpoint``, ``ckpt_path`` and ``trainer.save_checkpoint`` stay what they are: all ranks write each
    checkpoint together, in the background, and any number of ranks resumes from it. What lies on the disk is as with
    ``AsyncckptIO``, whose options are given as ``plugins=[AsyncckptIO(…)]``. ``save_distributed_checkpoint`` makes no
    difference. Every rank makes the same calls. Errors of background saves are raised by the next save, or at the end
    of ``fit``.
    """


class AsyncckptFSDPStrategy(SavesOnAllRanks, FSDPStrategy):
    """Lightning's ``FSDPStrategy`` (FSDP 1), which takes the same arguments: see ``AsyncckptModelParallelStrategy``.
    ``state_dict_type`` makes no difference: no rank gathers the weights."""


class AsyncckptDDPStrategy(SavesOnAllRanks, DDPStrategy):
    """Lightning's ``DDPStrategy``, which takes the same arguments: see ``AsyncckptModelParallelStrategy``. Each rank
    writes a part of every checkpoint, where with ``AsyncckptIO`` alone rank 0 writes all. Raises ``InvalidOption`` for
    another ``start_method`` than ``"popen"``, with which Lightning hands weights back in a file of its own."""

    #: Whether the last checkpoint was restored in place, so that Lightning has nothing left to load.
    _is_restored = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self._start_method != "popen":
            raise InvalidOption(f"AsyncckptDDPStrategy(start_method={self._start_method!r}): leave it 'popen'")

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether the model is wrapped, and optimizers are made, before a checkpoint is loaded."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning loads optimizers from the dictionary that ``load_checkpoint`` has returned."""
        return not self._is_restored

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights of a checkpoint that was not restored in place."""
        if not self._is_restored:
            super().load_model_state_dict(checkpoint, strict)

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Do what ``AsyncckptModelParallelStrategy`` does, and take what rank 0 has saved alone, too."""
        self._is_restored = False
        return super().load_checkpoint(checkpoint_path, weights_only)

    def _restored(self, saved: Saved, where: str) -> dict[str, Any]:
        found = super()._restored(saved, where)
        self._is_restored = True
        return found

    def _load_of_one_rank(self, path: Path) -> dict[str, Any]:
        return self._io().load_checkpoint(path)
