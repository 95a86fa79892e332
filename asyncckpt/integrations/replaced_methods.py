"""Which methods of a trainer's other bases ``AsyncCheckpointMixin`` replaces, and what those of TRL would have saved.

A base that comes after the mixin and writes files of its own into each checkpoint would not be asked to. That is
refused, but for the trainers of TRL, of which it is known what they add.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from asyncckpt.errors import InvalidOption

#: The plain trainer calls these for a checkpoint, and the mixin has its own.
_OF_BASES: Final = (
    "_save_checkpoint",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_scaler",
    "_load_rng_state",
    "_load_best_model",
)
#: The plain trainer writes the weights of a checkpoint by these. The mixin calls them for none.
_OF_ANY: Final = ("save_model", "_save")
#: These have been read: they write a model card beside the checkpoints, and what ``trl_assets`` returns.
_OF_TRL: Final = {"_save_checkpoint", "_load_optimizer_and_scheduler"}
_ENTROPY_ASSET: Final = "entropy_ctrl_state.json"


def check_replaced(kind: type[Any], mixin: type[Any], trainer: type[Any]) -> None:
    """Raise ``InvalidOption`` where a method of a class between ``kind`` and the plain ``trainer`` would not be called,
    without a word. ``kind.replaced_methods`` names those that are not missed, as ``"Class.method"``."""
    order = kind.__mro__
    first, last = order.index(mixin), order.index(trainer)
    skipped = [(cls, name) for cls in order[first + 1 : last] for name in _OF_BASES if name in vars(cls)]
    skipped = [(cls, name) for cls, name in skipped if not (is_of_trl(cls) and name in _OF_TRL)]
    skipped += [(cls, name) for cls in order[:last] if cls is not mixin for name in _OF_ANY if name in vars(cls)]
    for cls, name in skipped:
        called = f"{cls.__name__}.{name}"
        if called not in kind.replaced_methods:
            raise InvalidOption(
                f"{kind.__name__}: a checkpoint of AsyncCheckpointMixin does not call {called}. Return what it saves "
                f"from checkpoint_state() (files that do not change: from checkpointer_options(), as 'assets'); then "
                f"say so with replaced_methods = {{{called!r}}} in {kind.__name__}"
            )


def is_of_trl(kind: type[Any]) -> bool:
    """Return whether TRL has defined this class."""
    return kind.__module__.partition(".")[0] == "trl"


def write_model_card(trainer: Any) -> None:
    """Have a trainer of TRL write the model card into its output directory, as it does with each checkpoint."""
    if any(is_of_trl(kind) for kind in type(trainer).__mro__):
        trainer.create_model_card(model_name=Path(trainer.args.hub_model_id or trainer.args.output_dir).name)


def trl_assets(trainer: Any) -> dict[str, bytes]:
    """Return the files that a trainer of TRL adds to a checkpoint: where GRPO adapts its entropy, the coefficient."""
    if not getattr(trainer, "use_adaptive_entropy", False):
        return {}
    state = {"entropy_coef": trainer.entropy_coef, "last_world_entropy": trainer._last_world_entropy}
    return {_ENTROPY_ASSET: json.dumps(state).encode()}


def load_trl_assets(trainer: Any, assets: dict[str, bytes]) -> None:
    """Give a trainer of TRL back what ``trl_assets`` has returned."""
    if getattr(trainer, "use_adaptive_entropy", False) and _ENTROPY_ASSET in assets:
        state = json.loads(assets[_ENTROPY_ASSET])
        trainer.entropy_coef, trainer._last_world_entropy = state["entropy_coef"], state["last_world_entropy"]
