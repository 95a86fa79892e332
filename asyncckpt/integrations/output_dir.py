"""The folder that a trainer of Transformers saves into, which may hold checkpoints of ours and of the plain trainer."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any, Final

from asyncckpt.catalog.retention import Candidate, age
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.run import Run
from asyncckpt.types import MANIFEST_FILE

STATE_ASSET: Final = "trainer_state.json"
#: The plain ``Trainer`` reads these with torch. Where one is missing it goes on, in silence, with a new optimizer.
NOTICES: Final = ("optimizer.pt", "scheduler.pt")
#: What the components of a trainer's checkpoint are called.
MODEL: Final = "model"
OPTIMIZER: Final = "optimizer"
SCHEDULER: Final = "scheduler"
SCALER: Final = "scaler"
RANDOM: Final = "random"
#: The template of the directories' names, which is that of the plain trainer.
NAME: Final = "checkpoint-{step}"
_FOLDER: Final = re.compile(r"checkpoint-(\d+)\Z")


@dataclasses.dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A checkpoint of ours, by its directory."""

    path: str
    run: Run
    step: int

    @classmethod
    def at(cls, path: str | os.PathLike[str] | None) -> SavedCheckpoint | None:
        """Return the checkpoint whose directory this is; None where it is no directory of ours."""
        if path is None or not os.path.isfile(os.path.join(path, MANIFEST_FILE)):
            return None
        path = os.path.abspath(path)
        folder, name = os.path.split(path)
        run = Run(folder)
        entry = next((one for one in run.ls() if one.name == name), None)
        if entry is None:
            raise CheckpointDamaged(f"{path}: it has a {MANIFEST_FILE}, and is no checkpoint of {folder}")
        return cls(path, run, entry.step)

    def is_at(self, path: str | os.PathLike[str] | None) -> bool:
        return path is not None and os.path.abspath(path) == self.path

    def check_assets(self) -> None:
        """Read the assets, which the trainer reads without verifying them. Raises ``CheckpointDamaged``."""
        self.run.assets(self.step)


class SaveTotalLimit:
    """Keeps what ``save_total_limit`` says: the newest and the best one, and of the others as many as there is room
    for, the newest first."""

    def __init__(self, limit: int, trainer: Any) -> None:
        self._limit = limit
        self._trainer = trainer

    def keep(self, candidates: Sequence[Candidate]) -> set[int]:
        newest_first = list(dict.fromkeys(one.step for one in sorted(candidates, key=age, reverse=True)))
        best = self._trainer.state.best_model_checkpoint
        protected = {step_of(best)} & set(newest_first) if best else set()
        chosen = [*newest_first[:1], *sorted(protected), *newest_first[1:]]
        return set(list(dict.fromkeys(chosen))[: max(self._limit, len({*newest_first[:1], *protected}))])

    def describe(self) -> str:
        return f"save_total_limit={self._limit}"


def address_of(folder: str) -> str:
    return Run(folder).path


def step_of(path: str) -> int:
    found = _FOLDER.match(os.path.basename(os.path.normpath(path)))
    return int(found[1]) if found else -1


def usable_checkpoints(folder: str) -> list[str]:
    """List the directories of our checkpoints in a folder that look whole, the newest first."""
    if not os.path.isdir(folder):
        return []
    entries = [one for one in Run(folder).ls() if one.kind == "full" and not one.renamed]
    for entry in entries:
        if entry.damage is not None:
            warnings.warn(f"checkpoint {entry.path} cannot be used: {entry.damage}", RuntimeWarning, stacklevel=4)
    return [os.path.join(folder, entry.name) for entry in reversed(entries) if entry.damage is None]


def last_of_plain_trainer(folder: str) -> str | None:
    """Return the directory of the last checkpoint in a folder that the plain trainer wrote, if there is one."""
    if not os.path.isdir(folder):
        return None
    found = [
        path
        for name in os.listdir(folder)
        if _FOLDER.match(name)
        and os.path.isfile(os.path.join(path := os.path.join(folder, name), STATE_ASSET))
        and not os.path.exists(os.path.join(path, MANIFEST_FILE))
    ]
    return max(found, key=step_of, default=None)
