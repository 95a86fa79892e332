"""How many threads should read? ``pytest benchmarks/micro/test_reading.py -m bench`` (docs/design/004-reading.md).

Each number of threads reads, verifies and copies one checkpoint from pytest's temporary files, by turns with a raw read
of the same files.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from asyncckpt import Checkpointer, Run
from asyncckpt.manifest.records import ExtentRecord, FileRecord
from asyncckpt.read.extents import read_extents
from benchmarks.harness.raw import Ceiling, drop_page_cache
from benchmarks.harness.state import all_tensors, plain_state

pytestmark = pytest.mark.bench

THREADS = (2, 3, 4, 8)
ROUNDS = 5


def test_threads_against_a_raw_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = plain_state(16, 64 << 20)
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, state).result()
    ceiling = Ceiling(all_tensors(state), str(tmp_path / "raw"))
    target = np.ones(ceiling.nbytes + (64 << 20), np.uint8)
    ratios: dict[int, list[float]] = {threads: [] for threads in THREADS}
    with Run(tmp_path / "run").open() as checkpoint:
        reader, manifest = checkpoint.reader, checkpoint.manifest
        wanted = [(record, extent) for record in manifest.files for extent in record.extents]
        begins = {record.name: sum(r.nbytes for r in manifest.files[:n]) for n, record in enumerate(manifest.files)}

        def copy(file: FileRecord, extent: ExtentRecord, view: memoryview) -> None:
            begin = begins[file.name] + extent.offset
            target[begin : begin + extent.nbytes] = view

        files = [f"{reader.path}/{record.name}" for record in manifest.files if record.name.endswith(".safetensors")]
        for _ in range(ROUNDS):
            for threads in THREADS:
                raw = ceiling.read(files)
                drop_page_cache(reader.path)
                began = time.perf_counter()
                assert not read_extents(reader, manifest.digest, wanted, copy, threads=threads)
                ratios[threads].append(raw / (time.perf_counter() - began))
    with capsys.disabled():
        print()
        for threads, found in ratios.items():
            print(f"{threads} threads: {median(found):.2f} of raw ({min(found):.2f}..{max(found):.2f})")
