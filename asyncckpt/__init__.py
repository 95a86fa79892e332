"""asyncckpt saves asynchronous, verified, high-throughput checkpoints for PyTorch.

``Checkpointer`` writes and resumes a run; ``Run`` reads a run directory without writing to it. A name's module is
imported when the name is asked for: ``import asyncckpt`` alone imports neither torch nor NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from asyncckpt.catalog.listing import CheckpointInfo
    from asyncckpt.catalog.retention import KeepAll, KeepBest, KeepEvery, KeepFor, KeepLast, KeepSteps
    from asyncckpt.checkpointer import Checkpointer
    from asyncckpt.commit.pending import PendingSave, SaveReport
    from asyncckpt.errors import (
        ArenaBusy,
        AsyncCkptError,
        ChangedWhileCopied,
        CheckpointDamaged,
        CheckpointerClosed,
        CheckpointNotFound,
        DigestMismatch,
        DurabilityUnknown,
        InvalidOption,
        InvalidStep,
        LeaseLost,
        ManifestInvalid,
        MissingExtra,
        NewestDamaged,
        NotEnoughMemory,
        NotEnoughSpace,
        NoUsableCheckpoint,
        PlanChanged,
        RankLost,
        RanksDisagree,
        RestoreFailed,
        RunLocked,
        RunPathError,
        SaveAbandoned,
        SaveFailed,
        StateMismatch,
        StepExists,
        StorageFailed,
        UnknownName,
        UnsupportedValue,
        VersionUnsupported,
    )
    from asyncckpt.formats.options import Delta, Safetensors, Zarr
    from asyncckpt.loop.cadence import Milestones, Minutes, Steps
    from asyncckpt.loop.preemption import Preempted, Preemption
    from asyncckpt.ownership import RunOptions
    from asyncckpt.ranks.store import RankOptions
    from asyncckpt.read.damage import Damage
    from asyncckpt.restore.restore import RestoreReport
    from asyncckpt.run import Run
    from asyncckpt.stage.options import StagingOptions
    from asyncckpt.state.markers import LocalShard, Owner, PerRank, Replicated
    from asyncckpt.state.rng import RngState
    from asyncckpt.types import LeaseOptions
    from asyncckpt.write.options import WriterOptions

    __version__: str

__all__ = [
    # saving and restoring
    "Checkpointer",
    "Run",
    "PendingSave",
    "SaveReport",
    "RestoreReport",
    "CheckpointInfo",
    "Damage",
    "RngState",
    # many ranks
    "LocalShard",
    "Replicated",
    "Owner",
    "PerRank",
    "RankOptions",
    # when to save, what to keep
    "Steps",
    "Minutes",
    "Milestones",
    "KeepAll",
    "KeepLast",
    "KeepEvery",
    "KeepBest",
    "KeepFor",
    "KeepSteps",
    "Preemption",
    "Preempted",
    # what is written, and how
    "Safetensors",
    "Zarr",
    "Delta",
    "StagingOptions",
    "WriterOptions",
    "RunOptions",
    "LeaseOptions",
    # errors
    "AsyncCkptError",
    "ArenaBusy",
    "ChangedWhileCopied",
    "CheckpointDamaged",
    "CheckpointNotFound",
    "CheckpointerClosed",
    "DigestMismatch",
    "InvalidOption",
    "InvalidStep",
    "LeaseLost",
    "ManifestInvalid",
    "MissingExtra",
    "NewestDamaged",
    "NoUsableCheckpoint",
    "NotEnoughMemory",
    "NotEnoughSpace",
    "PlanChanged",
    "RankLost",
    "RanksDisagree",
    "RestoreFailed",
    "RunLocked",
    "RunPathError",
    "SaveAbandoned",
    "DurabilityUnknown",
    "SaveFailed",
    "StateMismatch",
    "StepExists",
    "StorageFailed",
    "UnknownName",
    "UnsupportedValue",
    "VersionUnsupported",
]

#: Each name that is not an error lives in one of these modules; errors live in ``errors.py``. Type checkers read the
#: imports above.
_HOMES: Final[dict[str, str]] = {
    "CheckpointInfo": "asyncckpt.catalog.listing",
    "KeepAll": "asyncckpt.catalog.retention",
    "KeepBest": "asyncckpt.catalog.retention",
    "KeepEvery": "asyncckpt.catalog.retention",
    "KeepLast": "asyncckpt.catalog.retention",
    "KeepFor": "asyncckpt.catalog.retention",
    "KeepSteps": "asyncckpt.catalog.retention",
    "Checkpointer": "asyncckpt.checkpointer",
    "PendingSave": "asyncckpt.commit.pending",
    "SaveReport": "asyncckpt.commit.pending",
    "Milestones": "asyncckpt.loop.cadence",
    "Minutes": "asyncckpt.loop.cadence",
    "Steps": "asyncckpt.loop.cadence",
    "Preempted": "asyncckpt.loop.preemption",
    "Preemption": "asyncckpt.loop.preemption",
    "RankOptions": "asyncckpt.ranks.store",
    "Damage": "asyncckpt.read.damage",
    "RestoreReport": "asyncckpt.restore.restore",
    "Run": "asyncckpt.run",
    "Owner": "asyncckpt.state.markers",
    "PerRank": "asyncckpt.state.markers",
    "Replicated": "asyncckpt.state.markers",
    "LocalShard": "asyncckpt.state.markers",
    "RngState": "asyncckpt.state.rng",
    "LeaseOptions": "asyncckpt.types",
    "Delta": "asyncckpt.formats.options",
    "Safetensors": "asyncckpt.formats.options",
    "Zarr": "asyncckpt.formats.options",
    "StagingOptions": "asyncckpt.stage.options",
    "RunOptions": "asyncckpt.ownership",
    "WriterOptions": "asyncckpt.write.options",
}


if not TYPE_CHECKING:  # a checker that saw this would accept any name as one of the package

    def __getattr__(name: str) -> Any:
        """Return the exported object of that name. It becomes a global, so this runs once for each name."""
        if name == "__version__":
            from asyncckpt.manifest.environment import version

            value = version()
        elif name in __all__:
            value = getattr(importlib.import_module(_HOMES.get(name, "asyncckpt.errors")), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, "__version__"})
