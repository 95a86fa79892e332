"""asyncckpt: asynchronous, verified, high-throughput checkpoints for PyTorch.

``Checkpointer`` is the way in; ``Run`` reads a run directory without writing to it.
"""

from asyncckpt.catalog.catalog import CheckpointInfo
from asyncckpt.catalog.retention import KeepAll, KeepBest, KeepEvery, KeepLast, KeepSteps
from asyncckpt.checkpointer import Checkpointer
from asyncckpt.commit.pending import PendingSave, SaveReport
from asyncckpt.errors import (
    ArenaBusy,
    AsyncCkptError,
    CheckpointDamaged,
    CheckpointerClosed,
    CheckpointNotFound,
    DigestMismatch,
    InvalidOption,
    InvalidStep,
    LeaseLost,
    ManifestInvalid,
    MissingExtra,
    NotEnoughMemory,
    NotEnoughSpace,
    NoUsableCheckpoint,
    PlanChanged,
    RankLost,
    RanksDisagree,
    RunLocked,
    RunPathError,
    SaveAbandoned,
    SaveFailed,
    SaveUndecided,
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
from asyncckpt.manifest.environment import version
from asyncckpt.ownership import RunOptions
from asyncckpt.ranks.store import RankOptions
from asyncckpt.read.damage import Damage
from asyncckpt.restore.restore import RestoreReport
from asyncckpt.run import Run
from asyncckpt.stage.options import StagingOptions
from asyncckpt.state.markers import Replicated, Shard
from asyncckpt.state.rng import RngState
from asyncckpt.storage.lease import LeaseOptions
from asyncckpt.write.options import WriterOptions

__version__ = version()

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
    "Shard",
    "Replicated",
    "RankOptions",
    # when to save, what to keep
    "Steps",
    "Minutes",
    "Milestones",
    "KeepAll",
    "KeepLast",
    "KeepEvery",
    "KeepBest",
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
    "CheckpointDamaged",
    "CheckpointNotFound",
    "CheckpointerClosed",
    "DigestMismatch",
    "InvalidOption",
    "InvalidStep",
    "LeaseLost",
    "ManifestInvalid",
    "MissingExtra",
    "NoUsableCheckpoint",
    "NotEnoughMemory",
    "NotEnoughSpace",
    "PlanChanged",
    "RankLost",
    "RanksDisagree",
    "RunLocked",
    "RunPathError",
    "SaveAbandoned",
    "SaveUndecided",
    "SaveFailed",
    "StateMismatch",
    "StepExists",
    "StorageFailed",
    "UnknownName",
    "UnsupportedValue",
    "VersionUnsupported",
]
