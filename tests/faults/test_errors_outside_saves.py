"""What fails while checkpoints are listed, read, pinned or deleted comes out typed, with the run's path, as long as
nothing better is known; the run can be used once the storage answers again."""

from __future__ import annotations

import errno
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.scenarios import SCENARIOS, state_of

from asyncckpt import AsyncCkptError, Checkpointer, Delta, KeepLast, Run, StorageFailed
from asyncckpt.storage.posix import PosixOps
from asyncckpt.testing import InterceptedOps
from asyncckpt.testing.interception import OPERATIONS

#: A descriptor that was not closed is not ours to lose.
_CAN_FAIL = [name for name in OPERATIONS if name not in ("close", "close_read")]

CALLS: dict[str, Callable[[Any], object]] = {
    "ls": lambda run: run.ls(),
    "verify": lambda run: run.verify(2),
    "verify-newest": lambda run: run.verify(),
    "open": lambda run: run.open(2).close(),
    "load": lambda run: run.load_tensors(2),
    "restore": lambda run: run.restore(state_of(0), 2),
    "restore-newest": lambda run: run.restore(state_of(0)),
    "pin": lambda run: run.pin(2),
    "unpin": lambda run: run.unpin(2),
    "prune": lambda run: run.prune(),
    "prune-dry": lambda run: run.prune(dry_run=True),
}


class _Fails(InterceptedOps):
    """From the ``number``-th call of one operation on."""

    def __init__(self, operation: str, number: int) -> None:
        self.operation = operation
        self.left = number
        self.hit = False

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if name == self.operation:
            self.left -= 1
            if self.left <= 0:
                self.hit = True
                raise OSError(errno.EIO, "Input/output error")
        return args


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "run"
    with SCENARIOS["delta"].checkpointer(path, keep=(), delta=Delta(chain=2)) as run:
        for step in (1, 2, 3):
            run.save(step, state_of(step)).result()
        run.pin(1)
    return path


@pytest.mark.parametrize(
    ("name", "writes"),
    [(name, True) for name in CALLS] + [(name, False) for name in CALLS if not name.startswith("prune")],
)
def test_an_error_of_the_storage_comes_out_typed(name: str, writes: bool, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(saved, path)
    run = Checkpointer(path, keep=KeepLast(1)) if writes else Run(path)
    if isinstance(run, Checkpointer):
        run.prepare(state_of(0))
    hit = 0
    raised: list[AsyncCkptError] = []
    for operation in _CAN_FAIL:
        for number in (1, 2, 5):
            ops = run._store.ops = _Fails(operation, number)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that it falls back
                    CALLS[name](run)
            except AsyncCkptError as error:
                raised.append(error)
            hit += ops.hit
    run._store.ops = PosixOps()
    if isinstance(run, Checkpointer):
        run.save(4, state_of(4)).result()
        run.close()
    assert hit > 1
    bare = [error for error in raised if isinstance(error, StorageFailed)]
    assert bare
    assert all(str(path) in str(error) for error in raised)
    assert all("check the storage" in str(error) and error.errno == errno.EIO for error in bare)
    assert Run(path).verify() == []


@pytest.mark.parametrize("operation", ["scan", "lstat", "mkdir", "rmdir"])
def test_a_run_that_cannot_begin_says_why(operation: str, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(saved, path)
    run = Checkpointer(path)
    run._store.ops = _Fails(operation, 1)
    with pytest.raises(AsyncCkptError, match=str(path)):
        run.save(4, state_of(4))
    run._store.ops = PosixOps()
    run.save(4, state_of(4)).result()
    run.close()
