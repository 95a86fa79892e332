"""``AsyncCheckpointMixin`` has the ``Trainer`` of Transformers, and what inherits it, save in the background.

``class MyTrainer(AsyncCheckpointMixin, Trainer)`` is the whole change: ``TrainingArguments`` mean what they mean, the
directories are called ``checkpoint-N`` as ever, and ``train(resume_from_checkpoint=True)`` goes on from them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

from torch import nn

from asyncckpt.assets import read_assets
from asyncckpt.catalog.retention import checked_policies
from asyncckpt.checkpointer import Checkpointer
from asyncckpt.errors import CheckpointDamaged, InvalidOption, MissingExtra, NoUsableCheckpoint
from asyncckpt.integrations.output_dir import (
    MODEL,
    NAME,
    NOTICES,
    OPTIMIZER,
    RANDOM,
    SCALER,
    SCHEDULER,
    STATE_ASSET,
    SavedCheckpoint,
    SaveTotalLimit,
    address_of,
    last_of_plain_trainer,
    step_of,
    usable_checkpoints,
)
from asyncckpt.integrations.peft import Adapters
from asyncckpt.integrations.replaced_methods import check_replaced, load_trl_assets, trl_assets, write_model_card
from asyncckpt.ownership import RunOptions
from asyncckpt.run import Run
from asyncckpt.state.rng import RngState
from asyncckpt.types import MAX_EXTENT_BYTES

#: What the methods below find in ``self`` is a ``Trainer``'s, whose own annotations do not hold.
_Base: Any = object

try:
    import transformers

    from asyncckpt.integrations import hub
except ImportError as error:
    raise MissingExtra("AsyncCheckpointMixin needs transformers: pip install 'asyncckpt[transformers]'") from error

log = logging.getLogger("asyncckpt")

_ARGUMENTS_ASSET: Final = "training_args.json"
#: The first byte makes torch's loader take the text for the name of a class, which it shows as it refuses it.
_NOTICE: Final = (
    b"casyncckpt wrote this checkpoint, and its optimizer lies in optimizer*.safetensors: resume with "
    b"AsyncCheckpointMixin\nor write the files of the plain Trainer with 'asyncckpt export --trainer'\n"
)


class AsyncCheckpointMixin(_Base):  # type: ignore[misc]
    """Goes before ``Trainer`` in the bases of a class: ``class MyTrainer(AsyncCheckpointMixin, Trainer)``.

    A checkpoint holds the model (of a PEFT model its adapters), the optimizer, the scheduler, the gradient scaler and
    every rank's random numbers, and as assets the config, the tokenizer, ``trainer_state.json`` and
    ``training_args.json``: ``from_pretrained`` opens its directory as it lies. The plain ``Trainer`` refuses to resume
    from it; ``asyncckpt export --trainer`` makes a directory that it takes. Checkpoints of the plain ``Trainer`` are
    resumed from as they are, and never deleted.

    ``train`` ends when every save is durable, and raises the error of one that failed. Between two steps saves run in
    the background; callbacks that change weights in place outside the optimizer's step wrap that in
    ``trainer.checkpointer.guard()``. Raises ``InvalidOption`` for DeepSpeed, FSDP 1 and XLA, and where
    ``output_dir`` already has checkpoints of this library that this run does not go on from, and where another base
    saves in methods that this class replaces. Not thread-safe.
    """

    #: Methods of other bases, as ``"Class.method"``, that need not be called for a checkpoint; see the error that names
    #: this.
    replaced_methods: ClassVar[Collection[str]] = ()

    #: The checkpointer of the training that runs; None outside ``train``.
    checkpointer: Checkpointer | None = None
    #: Which checkpoint of ours training has begun with, or is to begin with.
    _asyncckpt_resume: SavedCheckpoint | None = None
    #: The random numbers as that checkpoint has left them; None until it is restored.
    _asyncckpt_random: dict[str, Any] | None = None
    _asyncckpt_trial: Any = None
    #: The step that this training has saved last.
    _asyncckpt_saved: int | None = None

    # -- what a subclass may override --------------------------------------------------------------------------------

    def checkpoint_state(self) -> dict[str, Any]:
        """Return what is saved and restored beside what the trainer has, as components by name: ``{"ema": ema}``.
        Called once all objects are there, and at each save."""
        return {}

    def checkpointer_options(self) -> dict[str, Any]:
        """Return more options for ``Checkpointer``, such as ``staging`` and ``files``, by name. ``keep`` holds beside
        ``save_total_limit``, and ``assets`` beside the trainer's."""
        return {}

    # -- training ----------------------------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *arguments: Any, **options: Any
    ) -> Any:
        """Train as ``Trainer.train`` does. With ``resume_from_checkpoint=True`` it goes on from the newest checkpoint
        in ``output_dir``, or, with a warning, from the one before where that is damaged. Blocks until every save is
        durable. Raises as ``Trainer.train``, ``Checkpointer.restore`` and ``Checkpointer.close`` do."""
        self._asyncckpt_trial = trial
        self._asyncckpt_check()
        self._asyncckpt_answer_signals()
        candidates: Sequence[str | None] = self._asyncckpt_candidates(resume_from_checkpoint)
        for number, path in enumerate(candidates):
            self._asyncckpt_resume, self._asyncckpt_random = SavedCheckpoint.at(path), None
            self._asyncckpt_saved = None
            try:
                with self._asyncckpt_closing():
                    if self._asyncckpt_resume is not None:
                        self._asyncckpt_resume.check_assets()
                    return super().train(path, trial, *arguments, **options)
            except CheckpointDamaged as error:
                restored = self._asyncckpt_random is not None  # then it is a save that has found damage
                if self._asyncckpt_resume is None or restored or number + 1 == len(candidates):
                    raise
                what = f"checkpoint {path} cannot be used: {error}; going back to {candidates[number + 1]}"
                warnings.warn(what, RuntimeWarning, stacklevel=2)
        raise AssertionError("there is always a candidate")

    def _prepare_for_training(self, *arguments: Any, **options: Any) -> Any:
        prepared = super()._prepare_for_training(*arguments, **options)
        saves = self._asyncckpt_opened()
        saves.watch(self.optimizer)
        saves.prepare(self._asyncckpt_state())
        return prepared

    def _finalize_training(self, *arguments: Any, **options: Any) -> Any:
        if self.checkpointer is not None:
            self.checkpointer.wait()
        limit = self.args.save_total_limit
        try:
            self.args.save_total_limit = None  # the plain trainer would delete directories itself
            return super()._finalize_training(*arguments, **options)
        finally:
            self.args.save_total_limit = limit

    # -- saving ------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        folder = self._get_output_dir(trial=trial)
        saves = self._asyncckpt_opened()
        if saves.path != address_of(folder):
            raise InvalidOption(f"{folder}: this training saves into {saves.path}; call train for another directory")
        state = self.state
        if state.best_global_step:
            best = os.path.join(folder, NAME.format(step=state.best_global_step))
            # this very step counts: the record of it becomes visible only together with the checkpoint
            if state.best_global_step == state.global_step or os.path.isdir(best):
                state.best_model_checkpoint = best
        write_model_card(self)
        again = state.global_step == self._asyncckpt_saved  # at the end of an epoch, after its last step
        if again and self.args.push_to_hub:
            self._finish_current_push()  # it reads the checkpoint that makes way
        pending = saves.save(
            state.global_step,
            self._asyncckpt_state(),
            metrics=self._asyncckpt_metrics(),
            assets=self._asyncckpt_own(),
            again=again,
        )
        self._asyncckpt_saved = state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(pending.result().path)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        hub.push(self, checkpoint_folder)

    def push_to_hub(self, *arguments: Any, **options: Any) -> Any:
        """Push the model as ``Trainer.push_to_hub`` does, without the files of the run. Blocks and raises as that."""
        with hub.output_without_run():
            return super().push_to_hub(*arguments, **options)

    def _asyncckpt_answer_signals(self) -> None:
        """Have the plain trainer's answer to SIGTERM, which ``enable_jit_checkpoint`` asks for, save as this class
        does. Its own would first make the checkpoint's directory, with a file that says that it is not finished: one of
        ours appears whole or not at all, and where something has its name it does not appear."""

        def save(manager: Any) -> None:
            manager.is_checkpoint_requested = False
            if self._asyncckpt_saved != self.state.global_step:
                self._save_checkpoint(self.model, trial=None)

        for callback in self.callback_handler.callbacks:
            manager = getattr(callback, "jit_manager", None)
            if manager is not None:
                manager.execute_jit_checkpoint = functools.partial(save, manager)
                # between forward and the optimizer's step no state can be resumed from to the bit: the step's end asks
                callback.on_pre_optimizer_step = lambda *_, **__: None

    def _asyncckpt_state(self) -> dict[str, Any]:
        """Return the components of a checkpoint."""
        bare = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        state: dict[str, Any] = dict(_modules(self.model if self.is_fsdp_enabled else bare))
        if not self.args.save_only_model:
            state |= {OPTIMIZER: self.optimizer, SCHEDULER: self.lr_scheduler}
            scaler = getattr(self.accelerator, "scaler", None)
            if scaler is not None:
                state[SCALER] = scaler
            state[RANDOM] = RngState()
        own = self.checkpoint_state()
        taken = sorted(own.keys() & state.keys())
        if taken:
            raise InvalidOption(f"checkpoint_state: the trainer has components called {', '.join(taken)}; rename yours")
        return state | own

    def _asyncckpt_own(self) -> dict[str, bytes]:
        """Return the assets that differ from save to save, with the callbacks' states brought up to date."""
        from transformers.trainer_callback import ExportableState

        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                name, current = type(callback).__name__, callback.state()
                known = self.state.stateful_callbacks[name]
                if isinstance(known, list):
                    known.append(current)
                else:
                    self.state.stateful_callbacks[name] = current
        text = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n"
        return {STATE_ASSET: text.encode(), **trl_assets(self)}

    def _asyncckpt_common(self) -> dict[str, Any]:
        """Return the assets that all checkpoints have."""
        assets: dict[str, Any] = {_ARGUMENTS_ASSET: self.args.to_json_string().encode()}
        if not self.args.save_only_model:
            assets |= dict.fromkeys(NOTICES, _NOTICE)
        bare = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not _is_peft(bare):
            for name in ("config", "generation_config"):
                found = getattr(bare, name, None)
                if hasattr(found, "save_pretrained"):
                    assets[name] = found
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            assets["tokenizer"] = tokenizer
        return assets

    def _asyncckpt_metrics(self) -> dict[str, float]:
        """Return the figures of an evaluation at this very step, if there was one, and the epoch."""
        metrics: dict[str, float] = {} if self.state.epoch is None else {"epoch": float(self.state.epoch)}
        for entry in reversed(self.state.log_history):
            if entry.get("step") != self.state.global_step:
                break
            found = {k: v for k, v in entry.items() if k.startswith("eval_") and isinstance(v, int | float)}
            metrics = {**{name: float(value) for name, value in found.items() if name.isidentifier()}, **metrics}
        return metrics

    def _asyncckpt_opened(self) -> Checkpointer:
        """Return the checkpointer of this training, made when it is asked for first."""
        if self.checkpointer is None:
            options = dict(self.checkpointer_options())
            run = dataclasses.replace(options.pop("run", RunOptions()), name=NAME, create_parents=True)
            keep = [*checked_policies(options.pop("keep", ()))]
            if self.args.save_total_limit is not None and self.args.save_total_limit > 0:
                keep.append(SaveTotalLimit(self.args.save_total_limit, self))
            assets = {**self._asyncckpt_common(), **read_assets(options.pop("assets", None), MAX_EXTENT_BYTES)}
            folder = self._get_output_dir(trial=self._asyncckpt_trial)
            self.checkpointer = Checkpointer(folder, keep=keep, assets=assets, run=run, **options)
        return self.checkpointer

    @contextlib.contextmanager
    def _asyncckpt_closing(self) -> Iterator[None]:
        """Close the checkpointer in the end: with an error of the body, or with that of a save."""
        with contextlib.ExitStack() as stack:

            def close(*raised: Any) -> None:
                saves, self.checkpointer = self.checkpointer, None
                if saves is not None:
                    saves.__exit__(*raised)

            stack.push(close)
            yield

    # -- resuming ----------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        resumed = self._asyncckpt_resume
        if resumed is not None and resumed.is_at(resume_from_checkpoint):
            return  # all of it is restored together, once there is an optimizer
        there = SavedCheckpoint.at(resume_from_checkpoint)
        if there is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._asyncckpt_load_model(there, self.model if model is None else model)

    def _load_best_model(self) -> None:
        there = SavedCheckpoint.at(self.state.best_model_checkpoint)
        if there is None:
            super()._load_best_model()
            return
        log.info("loading the best model from %s (score: %s)", there.path, self.state.best_metric)
        self._asyncckpt_load_model(there, self.model)

    def _asyncckpt_load_model(self, there: SavedCheckpoint, model: nn.Module) -> None:
        if self.checkpointer is not None:
            self.checkpointer.wait()
        bare = model if self.is_fsdp_enabled else self.accelerator.unwrap_model(model, keep_torch_compile=False)
        there.run.restore(_modules(bare), there.step)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        resumed = self._asyncckpt_resume
        if resumed is None or not resumed.is_at(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        saves = self._asyncckpt_opened()
        reader = saves if saves.path == resumed.run.path else resumed.run
        reader.restore(self._asyncckpt_state(), resumed.step)
        load_trl_assets(self, resumed.run.assets(resumed.step))
        self._asyncckpt_random = RngState().state_dict()

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._asyncckpt_resume is None or not self._asyncckpt_resume.is_at(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        resumed = self._asyncckpt_resume
        if resumed is None or not resumed.is_at(checkpoint):
            super()._load_rng_state(checkpoint)
        elif self._asyncckpt_random is not None:
            RngState().load_state_dict(self._asyncckpt_random)  # skipping data has drawn from the generators

    def _asyncckpt_candidates(self, asked: str | bool | None) -> list[str | None]:
        """List the directories to resume from, in the order in which they are tried; None is a new start."""
        folder = self._get_output_dir(trial=self._asyncckpt_trial)
        if isinstance(asked, str):
            return [asked]
        ours = usable_checkpoints(folder)
        if not asked:
            options = self.checkpointer_options().get("run", RunOptions())
            if ours and not options.overwrite:
                raise InvalidOption(
                    f"{folder} already has checkpoints, up to {os.path.basename(ours[0])}: go on from them with "
                    f"train(resume_from_checkpoint=True), or choose another output_dir to start anew"
                )
            return [None]
        foreign = last_of_plain_trainer(folder)
        if foreign is not None and (not ours or step_of(foreign) > step_of(ours[0])):
            return [foreign]
        if not ours:
            there = [entry.path for entry in Run(folder).ls()] if os.path.isdir(folder) else []
            if there:
                raise NoUsableCheckpoint(f"{folder}: {len(there)} checkpoints and none can be used: {', '.join(there)}")
            raise ValueError(f"No valid checkpoint found in output directory ({folder})")  # as the plain trainer does
        return list(ours)

    def _asyncckpt_check(self) -> None:
        """Raise ``InvalidOption`` for what this adapter cannot save right."""
        check_replaced(type(self), AsyncCheckpointMixin, transformers.Trainer)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        unsupported = {
            "DeepSpeed": self.is_deepspeed_enabled,
            "FSDP 1 (in fsdp_config say version 2)": self.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2,
            "XLA": self.accelerator.distributed_type.value == "XLA",
        }
        for name, used in unsupported.items():
            if used:
                raise InvalidOption(f"AsyncCheckpointMixin cannot save {name}; leave the mixin out to train with it")


def _modules(model: nn.Module) -> Mapping[str, nn.Module]:
    """Return the components of a model: of a PEFT model its adapters alone, as the plain trainer saves them, but for
    kinds whose stored tensors are computed."""
    if _is_peft(model):
        try:
            return Adapters.all(model)
        except InvalidOption as error:
            log.info("the whole PEFT model is saved: %s", error)
    return {MODEL: model}


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "base_model")
