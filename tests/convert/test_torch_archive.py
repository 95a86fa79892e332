"""Both readers of ``torch.save`` look into its archives in one way, and find damage in the pickle of either."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from asyncckpt import CheckpointDamaged
from asyncckpt.convert.dcp.safe_unpickle import tensor_in
from asyncckpt.convert.formats import import_checkpoint


def _of_dcp(data: bytes, folder: Path) -> None:
    tensor_in(memoryview(data), "a value")


def _of_file(data: bytes, folder: Path) -> None:
    (folder / "model.pt").write_bytes(data)
    import_checkpoint(folder / "model.pt", folder / "run", 1)


def _saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("read", [_of_dcp, _of_file])
def test_a_flipped_bit_of_the_pickle_is_found(read: Callable[[bytes, Path], None], tmp_path: Path) -> None:
    data = bytearray(_saved(torch.arange(7)))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = next(one for one in archive.infolist() if one.filename.endswith("data.pkl"))
        begin = data.index(archive.read(info))
    at = data.index(bytes([7]), begin)  # the tensor's size
    data[at] ^= 1
    with pytest.raises(CheckpointDamaged, match="does not match its checksum"):
        read(bytes(data), tmp_path)


@pytest.mark.parametrize("read", [_of_dcp, _of_file])
def test_what_is_no_archive_or_a_compressed_one_is_refused(read: Callable[[bytes, Path], None], tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved(torch.ones(3)))) as given, zipfile.ZipFile(file, "w", 8) as packed:
        for info in given.infolist():
            packed.writestr(info.filename, given.read(info))
    with pytest.raises(CheckpointDamaged, match="compressed"):
        read(file.getvalue(), tmp_path)
    with pytest.raises(CheckpointDamaged):
        read(_saved(torch.ones(3))[:-40], tmp_path)
