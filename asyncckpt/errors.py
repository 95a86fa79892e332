"""Every error this library raises on purpose, in one tree.

    AsyncCkptError
    ├── UnsupportedValue      (TypeError)          a value in the training state that cannot be stored
    ├── InvalidStep           (ValueError)         a step that is no whole number >= 0, or goes backwards
    ├── InvalidOption         (ValueError)         an argument of the API that makes no sense
    ├── StepExists            (FileExistsError)    the step is already saved
    ├── RunPathError          (OSError)            the run directory cannot be used (missing, a file, read-only)
    ├── StorageFailed         (OSError)            the storage failed while checkpoints were looked at, read or deleted
    ├── RunLocked             (BlockingIOError)    another live run owns the directory
    ├── LeaseLost             (OSError)            another run took the directory over while this one was writing
    ├── NotEnoughSpace        (OSError)            the disk cannot hold the save
    ├── NotEnoughMemory       (MemoryError)        nothing to stage an extent in
    ├── SaveFailed            (OSError)            a background save failed; nothing was published
    │   ├── SaveAbandoned     (TimeoutError)       a save passed its deadline and was given up
    │   │   └── RankLost                           a rank of the job did not answer in time
    │   ├── SaveUndecided                          complete and visible, but nobody knows whether durably
    │   └── PlanChanged                            the state changed on some ranks only; the next save plans anew
    ├── RanksDisagree         (RuntimeError)       ranks of one job save different steps, or states that do not fit
    ├── ArenaBusy             (BlockingIOError)    a save was due while an earlier one held the arena
    ├── CheckpointerClosed    (RuntimeError)       use after close, or in a forked child
    ├── CheckpointNotFound    (FileNotFoundError)  no such step, or no checkpoint at all
    ├── CheckpointDamaged     (ValueError)         bytes, sizes or structure are not what was saved
    │   ├── ManifestInvalid                        the manifest itself is damaged, hostile or malformed
    │   ├── DigestMismatch                         it is not the checkpoint the caller expects
    │   └── NoUsableCheckpoint                     checkpoints exist and none of them verifies
    ├── VersionUnsupported    (ValueError)         written by a newer format version
    ├── StateMismatch         (KeyError)           names, shapes or dtypes differ from the live state
    ├── UnknownName           (KeyError)           an algorithm, format or tensor name that is not known
    └── MissingExtra          (ImportError)        an optional dependency is not installed

Each is also the builtin in brackets, so ``except OSError`` and friends keep working. A message names the path,
the step and the rank where there is one, and ends with what to do.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence


class AsyncCkptError(Exception):
    """The root: catching it catches everything asyncckpt raises on purpose."""


class UnsupportedValue(AsyncCkptError, TypeError):
    """A value that cannot be stored exactly without pickle; the message names its path in the state."""


class InvalidStep(AsyncCkptError, ValueError):
    """A step that is not a whole number >= 0, or that goes backwards."""


class InvalidOption(AsyncCkptError, ValueError):
    """An argument that makes no sense; the message names it and the accepted values."""


class StepExists(AsyncCkptError, FileExistsError):
    """The step already has a checkpoint (or a save in flight)."""


class RunPathError(AsyncCkptError, OSError):
    """The run directory cannot be used as it is."""


class StorageFailed(AsyncCkptError, OSError):
    """The storage failed while checkpoints were listed, read or deleted. Nothing is known to be wrong with them.
    ``errno`` is the system's."""


@contextlib.contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Around what reaches the storage of the run at ``path``: an error that only the system has named is raised as
    ``StorageFailed``."""
    try:
        yield
    except AsyncCkptError:
        raise
    except OSError as error:
        failed = StorageFailed(
            f"{path}: the storage failed ({type(error).__name__}: {error}). Nothing is known to be wrong with the "
            f"checkpoints: check the storage and its permissions, then try again"
        )
        failed.errno = error.errno
        raise failed from error


class RunLocked(AsyncCkptError, BlockingIOError):
    """Another live run holds the directory; the message names its host and pid and how to take over."""


class LeaseLost(AsyncCkptError, OSError):
    """Another run took this directory over; whatever this one was writing is not published."""


class NotEnoughMemory(AsyncCkptError, MemoryError):
    """The system gives no memory to stage even one extent in. Training can go on; this save is lost."""


class NotEnoughSpace(AsyncCkptError, OSError):
    """The file system cannot hold the save. Raised before anything is written where it can be foreseen."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)

    def __str__(self) -> str:
        return str(self.args[1])


class SaveFailed(AsyncCkptError, OSError):
    """A background save failed. Nothing was published, and every earlier checkpoint is untouched."""


class SaveAbandoned(SaveFailed, TimeoutError):
    """A save did not finish within its deadline and was given up, so that training goes on."""


class RankLost(SaveAbandoned):
    """A rank of the job died, stopped or never made the call that the others made; the message names it."""


class PlanChanged(SaveFailed):
    """Names or shapes changed on some ranks and not on others. Only this save is lost; the next one plans anew."""


class RanksDisagree(AsyncCkptError, RuntimeError):
    """The ranks of one job do not save the same thing; the message names the odd ones."""


class SaveUndecided(SaveFailed):
    """The checkpoint is complete and has its name, but making the name durable failed and so did taking it back.

    Not acknowledged: retention never counts it in this process, and saving the step again sets it aside."""


class ArenaBusy(AsyncCkptError, BlockingIOError):
    """A save was due while earlier saves still held the arena, and ``on_busy="error"`` was chosen."""


class CheckpointerClosed(AsyncCkptError, RuntimeError):
    """The checkpointer was closed, or is used in a forked child process."""


class CheckpointNotFound(AsyncCkptError, FileNotFoundError):
    """The run directory holds no such checkpoint."""


class CheckpointDamaged(AsyncCkptError, ValueError):
    """The checkpoint's bytes, sizes or structure are not what was saved."""


class ManifestInvalid(CheckpointDamaged):
    """The manifest is missing, damaged, hostile or malformed."""


class DigestMismatch(CheckpointDamaged):
    """The manifest is not the one whose digest the caller knows (``expect_digest``). It may be good by itself."""


class NoUsableCheckpoint(CheckpointDamaged):
    """Checkpoints exist, and none of them verifies. Never answered by starting from scratch."""


class VersionUnsupported(AsyncCkptError, ValueError):
    """The checkpoint was written by a newer format version than this library reads."""


class StateMismatch(AsyncCkptError, KeyError):
    """Names, shapes or dtypes in the checkpoint differ from the live state; all of them are listed together.

    ``missing``: in the live state, not in the checkpoint. ``unexpected``: in the checkpoint, not in the live state.
    ``mismatched``: in both, with another shape or dtype. Nothing was changed when this is raised, but where the message
    says so: all three are empty then, and a live object did not take the values.
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


class UnknownName(AsyncCkptError, KeyError):
    """A digest, format, codec or tensor name that this installation does not know."""

    def __str__(self) -> str:
        return str(self.args[0])


class MissingExtra(AsyncCkptError, ImportError):
    """An optional dependency is missing; the message gives the ``pip install`` line."""
