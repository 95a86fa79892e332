"""Every error that this library raises on purpose belongs to one tree.

    AsyncCkptError
    ├── UnsupportedValue      (TypeError)          a value in the training state that cannot be stored
    ├── InvalidStep           (ValueError)         a step that is not a whole number >= 0, or goes backwards
    ├── InvalidOption         (ValueError)         an argument of the API that makes no sense
    ├── StepExists            (FileExistsError)    the step is already saved
    ├── RunPathError          (OSError)            the run directory cannot be used (missing, a file, read-only)
    ├── StorageFailed         (OSError)            the storage failed while checkpoints were looked at, read or deleted
    ├── RunLocked             (BlockingIOError)    another live run owns the directory
    ├── LeaseLost             (OSError)            another run took the directory over while this one was writing
    ├── NotEnoughSpace        (OSError)            the disk cannot hold the save
    ├── NotEnoughMemory       (MemoryError)        there is no memory to stage even one extent in, or to restore
    ├── SaveFailed            (OSError)            a background save failed; nothing was published
    │   ├── SaveAbandoned     (TimeoutError)       a save passed its deadline and was given up
    │   │   └── RankLost                           a rank of the job did not answer in time
    │   ├── DurabilityUnknown                      complete and visible, but perhaps not durable
    │   ├── ChangedWhileCopied                     a watched tensor changed outside the update before it was copied
    │   └── PlanChanged                            the state changed on some ranks only; the next save plans anew
    ├── RanksDisagree         (RuntimeError)       ranks of one job save different steps, or states that do not fit
    ├── ArenaBusy             (BlockingIOError)    a save was due while an earlier one held the arena
    ├── CheckpointerClosed    (RuntimeError)       use after close, or in a forked child
    ├── CheckpointNotFound    (FileNotFoundError)  no such step, or no checkpoint at all
    ├── CheckpointDamaged     (ValueError)         bytes, sizes or structure are not what was saved
    │   ├── ManifestInvalid                        the manifest itself is damaged, hostile or malformed
    │   ├── DigestMismatch                         it is not the checkpoint the caller expects
    │   ├── NewestDamaged                          the newest one is, and no older one was asked for
    │   └── NoUsableCheckpoint                     checkpoints exist and none of them verifies
    ├── VersionUnsupported    (ValueError)         written by a newer format version
    ├── StateMismatch         (KeyError)           names, shapes or dtypes differ from the live state
    ├── RestoreFailed         (RuntimeError)       a restore broke off for a reason that is not the checkpoint's
    ├── UnknownName           (KeyError)           an algorithm, format or tensor name that is not known
    └── MissingExtra          (ImportError)        an optional dependency is not installed

Each error is also the builtin in brackets, so ``except OSError`` and the like keep working. A message names the path,
the step and, in a job, the rank, and ends with what to do. An error of a save in the background is raised by
``PendingSave.result`` or by the next call of the checkpointer.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence


class AsyncCkptError(Exception):
    """``AsyncCkptError`` is the root of all errors that this library raises on purpose.

    An error of ``resume`` or ``restore`` says in ``overwritten`` which components of the live state have changed,
    wholly or in part, and in ``untouched`` which have not. Both are empty on any other error.
    """

    overwritten: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()


class UnsupportedValue(AsyncCkptError, TypeError):
    """A value of the training state cannot be stored exactly without pickle. The message names its path in the
    state."""


class InvalidStep(AsyncCkptError, ValueError):
    """The step is not a whole number >= 0, or it is lower than the newest one and nothing older was restored first."""


class InvalidOption(AsyncCkptError, ValueError):
    """An argument makes no sense. The message names it and the values that are accepted."""


class StepExists(AsyncCkptError, FileExistsError):
    """The step already has a checkpoint or a save in flight, or something else has the name that it would get. What is
    there was left as it is."""


class RunPathError(AsyncCkptError, OSError):
    """The run directory cannot be used: it is missing, a file, read-only, or not the one that other ranks see."""


class StorageFailed(AsyncCkptError, OSError):
    """The storage failed while checkpoints were listed, read or deleted. Nothing is known to be wrong with the
    checkpoints themselves. ``errno`` is the system's."""


@contextlib.contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Raise an ``OSError`` of the system as ``StorageFailed``. Put it around code that reaches the storage of the run
    at ``path``; errors of this library pass through unchanged."""
    try:
        yield
    except AsyncCkptError:
        raise
    except OSError as error:
        raise storage_failed(path, error) from error


def storage_failed(path: str, error: OSError, doing: str = "") -> StorageFailed:
    """Return the error for what the storage of the run at ``path`` has answered; ``doing`` says during what."""
    when = f" while {doing}" if doing else ""
    failed = StorageFailed(
        f"{path}: the storage failed{when} ({type(error).__name__}: {error}). Nothing is known to be wrong with the "
        f"checkpoints: check the storage and its permissions, then try again"
    )
    failed.errno = error.errno
    return failed


class RunLocked(AsyncCkptError, BlockingIOError):
    """Another live run owns the directory. The message names its host and pid, and says how to take the directory
    over."""


class LeaseLost(AsyncCkptError, OSError):
    """Another run has taken the directory over. What this one was writing is not published."""


class NotEnoughMemory(AsyncCkptError, MemoryError):
    """The system gives no memory to stage even one extent in: only this save is lost, and training can go on. Or the
    host or the device gives none for what a restore has to make."""


class NotEnoughSpace(AsyncCkptError, OSError):
    """The file system cannot hold the save. Where that can be foreseen, it is raised before anything is written."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)

    def __str__(self) -> str:
        return str(self.args[1])


class SaveFailed(AsyncCkptError, OSError):
    """A background save failed. Nothing was published, and every earlier checkpoint is untouched."""


class SaveAbandoned(SaveFailed, TimeoutError):
    """A save did not finish within its deadline, and was given up so that training goes on."""


class RankLost(SaveAbandoned):
    """A rank of the job died, stopped, or never made the call that the others made. The message names the rank."""


class PlanChanged(SaveFailed):
    """Names or shapes of the state changed on some ranks and not on others. Only this save is lost: the ranks plan the
    next one anew."""


class ChangedWhileCopied(SaveFailed):
    """A tensor of a watched optimizer was changed before its copy was made, and not by the optimizer's ``step``. The
    message names it. Only this save is lost: the tensor is copied before ``save`` returns from then on."""


class RanksDisagree(AsyncCkptError, RuntimeError):
    """The ranks of one job do not save, or read, the same thing. The message names the ranks that differ."""


class DurabilityUnknown(SaveFailed):
    """The checkpoint is complete and has its name, but the storage failed both to make the name durable and to take it
    back: after a power loss the checkpoint may be there or not.

    The save is not acknowledged. In this process retention never counts the checkpoint, and a save of the same step
    sets it aside."""


class ArenaBusy(AsyncCkptError, BlockingIOError):
    """A save was due while earlier saves still held the staging memory, or too many were in flight, and
    ``StagingOptions.on_busy`` is ``error``, or is ``wait`` and the stall timeout has passed."""


class CheckpointerClosed(AsyncCkptError, RuntimeError):
    """The checkpointer was closed, or it is used in a forked child process."""


class CheckpointNotFound(AsyncCkptError, FileNotFoundError):
    """The run directory holds no such checkpoint."""


class CheckpointDamaged(AsyncCkptError, ValueError):
    """The checkpoint's bytes, sizes or structure are not what was saved."""


class ManifestInvalid(CheckpointDamaged):
    """The manifest is missing, damaged, malformed or hostile."""


class DigestMismatch(CheckpointDamaged):
    """The manifest is not the one whose digest the caller gave (``expect_digest``). The checkpoint may still be
    undamaged."""


class NewestDamaged(CheckpointDamaged):
    """The newest checkpoint is damaged, and the caller named no other: an older one is never read in its place. The
    message says what is wrong with it. ``usable_step``: the step of the newest checkpoint that looks whole, or None."""

    usable_step: int | None = None


class NoUsableCheckpoint(CheckpointDamaged):
    """Checkpoints exist, and none of them can be restored. The library never starts from scratch instead."""


class VersionUnsupported(AsyncCkptError, ValueError):
    """The checkpoint was written by a newer format version than this library reads."""


class StateMismatch(AsyncCkptError, KeyError):
    """Names, shapes or dtypes in the checkpoint differ from the live state. All differences are listed together.

    ``missing`` names what is in the live state and not in the checkpoint, ``unexpected`` what is in the checkpoint and
    not in the live state, and ``mismatched`` what is in both with another shape or dtype. Nothing has been changed
    then. All three are empty where a live object refused its values, as its ``load_state_dict`` did: the message, and
    the attributes ``overwritten`` and ``untouched``, say what has been changed.
    """

    def __init__(
        self, message: str, missing: Sequence[str] = (), unexpected: Sequence[str] = (), mismatched: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)

    def __str__(self) -> str:
        return str(self.args[0])


class RestoreFailed(AsyncCkptError, RuntimeError):
    """A restore broke off for a reason that lies neither in the checkpoint nor in what was asked for: an error of the
    device or of torch, say, or one that another rank reports. The message says what was being done."""


class UnknownName(AsyncCkptError, KeyError):
    """The name of a digest, format, codec or tensor is not known here."""

    def __str__(self) -> str:
        return str(self.args[0])


class MissingExtra(AsyncCkptError, ImportError):
    """An optional dependency is not installed. The message gives the ``pip install`` line."""
