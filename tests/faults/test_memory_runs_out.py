"""Reading where memory is short: no verdict is ever "good" because nobody looked."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncckpt import Checkpointer, Run
from asyncckpt.read import extents as reading


@pytest.fixture
def run(tmp_path: Path) -> Run:
    with Checkpointer(tmp_path / "run") as writer:
        writer.save(1, {"w": torch.arange(9)}).result()
    return Run(tmp_path / "run")


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))], ids=repr)
def test_a_reader_without_memory_for_its_buffer_is_an_error_and_not_a_good_checkpoint(
    error: BaseException, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_nbytes: int) -> Any:
        raise error

    monkeypatch.setattr(reading, "aligned_buffer", refuse)
    for use in (lambda: run.verify(1), lambda: run.load_tensors(1), lambda: run.restore({"w": torch.arange(9)}, 1)):
        with pytest.raises(MemoryError):
            use()


def test_readers_of_large_extents_share_one_budget(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads, each with a buffer for the largest extent, would take eight times what one extent may have."""
    buffers: list[int] = []
    lock = threading.Lock()
    real = reading.aligned_buffer

    def count(nbytes: int) -> Any:
        with lock:
            buffers.append(nbytes)
        return real(nbytes)

    monkeypatch.setattr(reading, "aligned_buffer", count)
    with run.open(1) as checkpoint:
        reader, manifest = checkpoint.reader, checkpoint.manifest
        wanted = [(file, extent) for file in manifest.files for extent in file.extents] * 20
        largest = max(extent.nbytes for _, extent in wanted)
        monkeypatch.setattr(reading, "_BUFFERS_BYTES", 2 * largest)
        assert reading.read_extents(reader, manifest.digest, wanted, lambda *_: None, threads=8) == []
    assert len(buffers) == 2
