"""``AsyncCheckpointMixin`` pushes to the Hub the weights of a durable checkpoint as it lies, and no file of the run.

The plain trainer copies a checkpoint's weights into its output directory, and pushes that as a whole. Here it is a run,
which has files of its own; and its checkpoints' weights have other names than those that ``save_model`` writes, so what
was pushed before would lie beside them, and ``from_pretrained`` would open the older.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
from collections.abc import Iterator
from typing import Any, Final

import transformers.trainer
from huggingface_hub import HfApi
from transformers.utils.hub import PushInProgress

from asyncckpt.errors import InvalidOption
from asyncckpt.integrations.output_dir import NOTICES, STATE_ASSET, SavedCheckpoint

#: The weights of a model, or of an adapter, by the names that ``from_pretrained`` looks for.
_WEIGHTS: Final = (
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
)
_ADAPTERS: Final = (
    "adapter_model*.safetensors",
    "adapter_config.json",
    "*/adapter_model*.safetensors",
    "*/adapter_config.json",
)
#: What a run keeps beside its checkpoints, and the checkpoints themselves.
_OF_RUN: Final = (".asyncckpt*", ".tmp*", ".trash*", ".replaced*", ".damaged*", "latest", "checkpoint-*", "_*")


@functools.cache
def _api() -> Any:
    return HfApi()


def push(trainer: Any, folder: str) -> None:
    """Begin to upload a durable checkpoint as ``hub_strategy`` says, in the background; retention spares it until then.

    As with the plain trainer, nothing happens where the last push is not done, but with ``hub_always_push``. Raises
    ``InvalidOption`` where the checkpoint has no weights that ``from_pretrained`` opens.
    """
    args = trainer.args
    strategy = args.hub_strategy.value
    busy = trainer.is_world_process_zero() and trainer.push_in_progress is not None
    busy = busy and not trainer.push_in_progress.is_done()
    if not trainer.is_world_process_zero() or strategy == "end" or (busy and not args.hub_always_push):
        return
    there = SavedCheckpoint.at(folder)
    assert there is not None, "it is durable"
    held = there.run.open(there.step)
    with contextlib.ExitStack() as stack:
        stack.callback(held.close)
        files = {os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names}
        weights = [name for name in files if _matches(name, (*_WEIGHTS, *_ADAPTERS))]
        # compressed weights have no index, for nothing but this library reads them
        if not {"model.safetensors.index.json", "adapter_model.safetensors"} & {os.path.basename(f) for f in weights}:
            raise InvalidOption(
                f"{folder}: from_pretrained opens no weights of it, so it cannot be pushed. Leave 'files' in "
                f"checkpointer_options() as it is, or push once, after training: hub_strategy='end'"
            )
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        message = f"Training in progress, step {trainer.state.global_step}"
        upload = functools.partial(
            _api().upload_folder,
            repo_id=trainer.hub_model_id,
            token=args.hub_token,
            revision=args.hub_revision,
            run_as_future=True,
        )
        own = held.assets().keys() - {STATE_ASSET, *NOTICES}
        jobs = [
            upload(
                folder_path=folder, commit_message=message, allow_patterns=[*weights, *own], delete_patterns=[*_WEIGHTS]
            )
        ]
        beside = (*_OF_RUN, *_WEIGHTS, *_ADAPTERS, *own)
        if any(not _matches(name, beside) for name in os.listdir(args.output_dir)):
            jobs.append(
                upload(
                    folder_path=args.output_dir,
                    commit_message=f"{message}, what lies beside the checkpoints",
                    ignore_patterns=[*beside],
                )
            )
        if strategy in ("checkpoint", "all_checkpoints"):
            into = "last-checkpoint" if strategy == "checkpoint" else os.path.basename(folder)
            jobs.append(
                upload(
                    folder_path=folder,
                    path_in_repo=into,
                    commit_message=f"{message}, checkpoint",
                    delete_patterns=["*"],  # of the last checkpoint, what this one has not
                )
            )
        stack.pop_all()
        jobs[-1].add_done_callback(lambda _: held.close())  # they run one after the other
    if not busy:
        trainer.push_in_progress = PushInProgress()
    trainer.push_in_progress.jobs.extend(jobs)


@contextlib.contextmanager
def output_without_run() -> Iterator[None]:
    """Have ``Trainer.push_to_hub`` push no file of the run, and delete weights in the repository that it does not push:
    those of checkpoints, which have other names. Raises ``InvalidOption`` where this release of Transformers uploads in
    another way than those that were tried."""
    trainers: Any = transformers.trainer
    before = getattr(trainers, "hf_api", None)
    if before is None:
        raise InvalidOption(
            f"push_to_hub: Transformers {transformers.__version__} uploads in a way that was not tried, and might push "
            f"old weights beside new ones. Use release 5.24, or push an export: asyncckpt export --hf, then "
            f"huggingface_hub.upload_folder"
        )
    api = before()

    class Sparing:
        def __getattr__(self, name: str) -> Any:
            return getattr(api, name)

        def upload_folder(self, **given: Any) -> Any:
            given["ignore_patterns"] = [*(given.get("ignore_patterns") or ()), *_OF_RUN]
            return api.upload_folder(**given, delete_patterns=[*_WEIGHTS])

    trainers.hf_api = Sparing
    try:
        yield
    finally:
        trainers.hf_api = before


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
