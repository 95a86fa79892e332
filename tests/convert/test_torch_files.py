"""Files of ``torch.save``: nothing in them is executed, what is lost is said, and damage is found."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import pickle
import random
import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.foreign import bits, imported, module_bits

from asyncckpt import CheckpointDamaged, CheckpointNotFound, UnsupportedValue
from asyncckpt.convert.formats import import_checkpoint
from asyncckpt.convert.selection import Selection
from asyncckpt.errors import AsyncCkptError


class _Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


class _Setting:
    def __init__(self) -> None:
        self.rate = 1


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_file_executes_nothing_and_the_rest_can_be_had(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "executed"
    content = {"model": {"w": torch.ones(3)}, "evil": _Attack(marker), "deep": [{"worse": _Attack(marker)}]}
    torch.save(content, tmp_path / "in.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsupportedValue, match=r"evil \(posix.mkdir\).*deep.0.worse \(posix.mkdir\).*--drop"):
        import_checkpoint(tmp_path / "in.pt", tmp_path / "run", 1)
    assert not (tmp_path / "run").exists(), "a run was made for what was refused"
    run, done = imported(tmp_path / "in.pt", tmp_path / "run", selection=Selection(drop=["*"]))
    assert not marker.exists()
    assert set(done.skipped) == {"evil", "deep.0.worse"}
    assert module_bits(run) == bits({"w": torch.ones(3)})
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(_Attack(marker)))
    with pytest.raises(CheckpointDamaged):
        import_checkpoint(tmp_path / "bare.pt", tmp_path / "run", 2)
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_values_come_back_as_they_were(tmp_path: Path, zipped: bool) -> None:
    values = {
        "args": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("/data"), sizes=(1, 2)),
        "array": np.arange(6.0).reshape(2, 3),
        "large": np.arange(20_000, dtype=np.int16),
        "number": np.float32(3.5),
        "milestones": collections.Counter({30: 1}),
        "ordered": collections.OrderedDict([("b", 1), ("a", None)]),
        "bytes": b"\x00\xff",
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
    }
    weights = {"w": torch.nn.Parameter(torch.ones(2, 2)), "t": torch.arange(6).reshape(2, 3).t()}
    torch.save({"net": weights, **values}, tmp_path / "in.pth", _use_new_zipfile_serialization=zipped)
    run, done = imported(tmp_path / "in.pth", tmp_path / "run")
    assert done.components["net"] == "module"
    assert any("'net' became the module of 2 tensors 'net'" in note for note in done.notes)
    assert module_bits(run, "net") == bits({name: value.detach() for name, value in weights.items()})
    for name, value in values.items():
        found = run.load(component=name)
        assert type(found) is type(value) or isinstance(value, torch.Size), name
        assert np.array_equal(found, value) if isinstance(value, np.ndarray) else found == value, name


def test_one_flipped_bit_in_a_tensor_is_found_by_the_checksum_of_the_archive(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "in.pt")
    with zipfile.ZipFile(tmp_path / "in.pt") as archive:
        place = next(info for info in archive.infolist() if info.filename.endswith("data/0")).header_offset
    data = bytearray((tmp_path / "in.pt").read_bytes())
    data[place + 2000] ^= 1
    (tmp_path / "in.pt").write_bytes(data)
    with pytest.raises(CheckpointDamaged, match="checksum"):
        import_checkpoint(tmp_path / "in.pt", tmp_path / "run", 1)


def test_a_file_without_checksums_says_that_damage_could_not_be_seen(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(10)}, tmp_path / "in.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    _, done = imported(tmp_path / "in.pt", tmp_path / "run")
    assert any("no checksum" in note for note in done.notes)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_give_typed_errors_or_what_was_saved(tmp_path: Path, zipped: bool) -> None:
    content = {"model": {"w": torch.arange(50.0), "n": torch.tensor(3)}, "epoch": 4, "a": np.arange(3)}
    torch.save(content, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole.pt").read_bytes()
    rng = random.Random(3)
    refused = 0
    for number in range(60):
        data = bytearray(whole)
        if number % 3:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            del data[rng.randrange(len(data)) :]
        (tmp_path / "in.pt").write_bytes(data)
        try:
            import_checkpoint(tmp_path / "in.pt", tmp_path / "run", number, selection=Selection(drop=["*"]))
        except AsyncCkptError:
            refused += 1
    assert refused > 20


def test_classes_are_named_and_dropped_and_what_is_excluded_is_no_loss(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "setting": _Setting(), "hyper": {"s": _Setting()}}, tmp_path / "in.pt")
    with pytest.raises(UnsupportedValue, match=r"setting \(test_torch_files._Setting\)"):
        import_checkpoint(tmp_path / "in.pt", tmp_path / "run", 1)
    with pytest.raises(UnsupportedValue, match=r"hyper.s"):
        import_checkpoint(tmp_path / "in.pt", tmp_path / "run", 1, selection=Selection(drop=["setting"]))
    _, done = imported(tmp_path / "in.pt", tmp_path / "run", selection=Selection(include=["model.*"]))
    assert dict(done.components) == {"model": "module"}


def test_a_pickle_of_claimed_sizes_takes_no_memory_and_changes_no_class(tmp_path: Path) -> None:
    huge_memo = b"\x80\x02Nr\xff\xff\xff\x7f."
    huge_buffer = b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"."
    changed_class = b"\x80\x02cargparse\nNamespace\nN}X\x03\x00\x00\x00odds\x86b."
    for number, body in enumerate((huge_memo, huge_buffer, changed_class)):
        file = tmp_path / f"{number}.pt"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x/data.pkl", body)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if number:
            with pytest.raises(CheckpointDamaged):
                import_checkpoint(file, tmp_path / "run", number)
        else:
            import_checkpoint(file, tmp_path / "run", number)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert not hasattr(argparse.Namespace, "odd")


def test_what_is_no_file_of_torch_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(CheckpointDamaged, match=r"no file of torch.save"):
        import_checkpoint(tmp_path / "text.pt", tmp_path / "run", 1)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(CheckpointDamaged, match=r"none of torch.save"):
        import_checkpoint(tmp_path / "zip.pt", tmp_path / "run", 1)
    with pytest.raises(CheckpointNotFound):
        import_checkpoint(tmp_path / "missing.pt", tmp_path / "run", 1)
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/data.pkl", pickle.dumps(1))
        archive.writestr("script/constants.pkl", pickle.dumps(()))
    with pytest.raises(CheckpointDamaged, match=r"TorchScript.*state_dict"):
        import_checkpoint(tmp_path / "script.pt", tmp_path / "run", 1)


def test_our_own_export_has_checksums_and_every_reader_of_archives_agrees(tmp_path: Path) -> None:
    from support.foreign import Holder, exported, saved

    run = saved(tmp_path / "run", {"model": Holder({"w": torch.randn(100, 100), "e": torch.empty(0)})})
    exported(run, tmp_path / "out.pt")
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None
        assert next(info for info in archive.infolist() if info.file_size == 40_000).CRC != 0
    _, done = imported(tmp_path / "out.pt", tmp_path / "again")
    assert not any("checksum" in note for note in done.notes)
    assert torch.load(tmp_path / "out.pt", weights_only=True, mmap=True)["w"].shape == (100, 100)
