"""One file that hangs for good (a storage server of a parallel file system that is down): it costs the save that it is
of, and no other, though the threads that wrote it never come back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.scenarios import SCENARIOS, Scenario, check_visible, leftovers, state_of

from asyncckpt import SaveAbandoned, WriterOptions
from asyncckpt.commit import committer
from asyncckpt.storage.posix import PosixOps
from asyncckpt.types import Buffer

pytestmark = pytest.mark.timeout(120)


class _Stuck(PosixOps):
    """Writes to the files of one step do not come back before ``release``."""

    def __init__(self, step: int) -> None:
        self.mark = f".tmp-{step:08d}-"
        self.release = threading.Event()
        self.stuck = 0

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        name = os.readlink(f"/proc/self/fd/{fd}")
        if self.mark in name and "/w" in name:  # the largest component
            self.stuck += 1
            assert self.release.wait(60)
        return super().pwrite(fd, data, offset)


@pytest.fixture
def stuck() -> Iterator[list[_Stuck]]:
    all_of_them: list[_Stuck] = []
    yield all_of_them
    for ops in all_of_them:
        ops.release.set()


@pytest.mark.parametrize(
    ("scenario", "times"),
    [
        pytest.param(SCENARIOS["safetensors"], 1, id="safetensors"),
        pytest.param(SCENARIOS["zarr-planes"], 1, id="zarr-planes"),
        pytest.param(SCENARIOS["zarr-planes"], 4, id="more-often-than-there-are-buffers", marks=pytest.mark.slow),
    ],
)
def test_a_file_that_hangs_for_good_costs_its_save_and_no_other(
    scenario: Scenario, times: int, stuck: list[_Stuck], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer, "_STUCK_SECONDS", 0.3)
    path = tmp_path / "run"
    options = WriterOptions(threads=2, durable_timeout_seconds=3)
    with scenario.checkpointer(path, keep=(), writer=options, staging_bytes=2 << 20) as run:
        run.save(1, state_of(1)).result()
        for step in range(10, 10 * times + 1, 10):
            ops = run._store.ops = _Stuck(step)
            stuck.append(ops)
            error = run.save(step, state_of(step)).exception(30)
            assert isinstance(error, SaveAbandoned)
            assert ops.stuck >= 2
            for after in (step + 1, step + 2):
                run.save(after, state_of(after)).result(30)
        monkeypatch.setattr(committer, "_STUCK_SECONDS", 30.0)
        for ops in stuck:
            ops.release.set()
    saved = [1, *(step + more for step in range(10, 10 * times + 1, 10) for more in (1, 2))]
    assert check_visible(path) == {step: step for step in saved}
    with scenario.checkpointer(path, keep=()) as run:
        run.prepare(state_of(1))
    assert not leftovers(path)
