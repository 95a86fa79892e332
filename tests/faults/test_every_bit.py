"""Every bit of every file of a checkpoint counts: one that flips is seen by ``verify``, and stops the restore."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from support.damaged_files import FORMATS, Stored

#: Of so many flips one is restored too: that takes longer than verifying.
RESTORE_STRIDE = 8


def _flip(stored: Stored, name: str, positions: list[int] | range, *, stride: int) -> int:
    data = stored.files[name]
    fd = os.open(stored.path / name, os.O_RDWR)
    try:
        for number, position in enumerate(positions):
            index, bit = divmod(position, 8)
            os.pwrite(fd, bytes([data[index] ^ (1 << bit)]), index)
            stored.check(f"{name}: bit {position} flipped", restoring=number % stride == 0)
            os.pwrite(fd, data[index : index + 1], index)
    finally:
        os.close(fd)
    return len(positions)


@pytest.mark.parametrize("name", ["encoded", "delta"])
def test_sampled_bit_flips_in_every_file_are_all_seen(name: str, tmp_path: Path) -> None:
    stored = Stored(tmp_path / "run", name, 700)
    rng = random.Random(name)
    for file, data in stored.files.items():
        _flip(stored, file, sorted(rng.sample(range(len(data) * 8), 25)), stride=2)
    assert any(file.startswith("base/") for file in stored.files) == (name == "delta")
    assert stored.run.verify(stored.step) == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", FORMATS)
def test_every_bit_flip_in_every_file_is_seen(name: str, tmp_path: Path) -> None:
    stored = Stored(tmp_path / "run", name, 300, 20 * 4096)  # a chunk a tensor: each is padded to a page
    flips = 0
    for file, data in stored.files.items():
        flips += _flip(stored, file, range(len(data) * 8), stride=RESTORE_STRIDE)
    assert flips == sum(map(len, stored.files.values())) * 8
    assert stored.run.verify(stored.step) == []
    print(f"{name}: {flips} bit flips in {len(stored.files)} files, all seen")
