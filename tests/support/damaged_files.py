"""Small checkpoints of each format are made here, whose files tests spoil and put back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conftest import bits

from asyncckpt import AsyncCkptError, CheckpointDamaged, Checkpointer, Delta, Run, VersionUnsupported
from support.options import by_stage

#: Each format has a name and says how it is saved; the last step of ``delta`` builds on the two before.
FORMATS: dict[str, dict[str, Any]] = {
    "safetensors": {},
    "encoded": {"codec": "planes"},
    "zarr": {"format": "zarr"},
    "zarr-planes": {"format": "zarr", "codec": "planes"},
    "delta": {"codec": "planes", "incremental": True, "delta": Delta(chain=2)},
}
#: Smaller tensors are stored as they are.
_ENCODED_NUMBERS = {"encoded": 17_000, "zarr-planes": 5000, "delta": 17_000}
STEPS = (1, 2, 3)


class Stored:
    """Holds a run directory of a format with three small checkpoints, none of which shares a file with another.

    ``numbers`` says how many values are random; zeros follow them where a codec is to have work.
    """

    def __init__(self, path: Path, name: str, numbers: int, extent_bytes: int = 24_576) -> None:
        options = {"incremental": False, "extent_bytes": extent_bytes, "shard_bytes": 2 * extent_bytes} | FORMATS[name]
        self.expected: dict[int, dict[str, Any]] = {}
        torch.manual_seed(0)
        zeros = torch.zeros(max(0, _ENCODED_NUMBERS.get(name, 0) - numbers))
        state: dict[str, Any] = {"w": {}, "plain": {"lr": 0.1}}
        base = {"big": torch.randn(numbers), "half": torch.randn(numbers)}
        with Checkpointer(path.with_name("linked"), **by_stage(**options)) as run:
            for step in STEPS:
                base = {key: value + torch.rand_like(value) / 64 for key, value in base.items()}
                big, half = torch.cat([base["big"], zeros]), base["half"].to(torch.bfloat16)
                state["w"] = {"big": big, "half": half, "n": torch.tensor(step)}
                run.save(step, state).result()
                self.expected[step] = {key: bits(value) for key, value in run.load_tensors(step).items()}
                assert self.expected[step]["w.big"] == bits(state["w"]["big"])
        shutil.copytree(path.with_name("linked"), path)  # the copy turns hard links into files of their own
        self.run = Run(path, direct=False)
        self.step = STEPS[-1]
        self.path = path / f"step-{self.step:08d}"
        self.files = self.read(self.step)

    def read(self, step: int) -> dict[str, bytes]:
        """Return the content of a checkpoint's files by name."""
        folder = self.path.with_name(f"step-{step:08d}")
        return {
            str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
        }

    @contextmanager
    def spoiled(self, changes: Mapping[str, bytes | None]) -> Iterator[None]:
        """Give files of the last checkpoint other contents (None deletes a file), and put them right again."""
        for name, data in changes.items():
            self._write(name, data)
        try:
            yield
        finally:
            for name in changes:
                self._write(name, self.files.get(name))

    def _write(self, name: str, data: bytes | None) -> None:
        file = self.path / name
        if data is None:
            file.unlink()
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(file, os.O_WRONLY | os.O_CREAT)
        try:
            os.pwrite(fd, data, 0)
            os.ftruncate(fd, len(data))
        finally:
            os.close(fd)

    def check(self, what: str, *, restoring: bool = True) -> None:
        """Check that ``verify`` sees the damage, and that reading gives the right values or none."""
        assert self.run.verify(self.step), f"unseen by verify: {what}"
        if not restoring:
            return
        for names in (None, ["w.half"]):
            try:
                loaded = self.run.load_tensors(self.step, names)
            except (CheckpointDamaged, VersionUnsupported):
                continue
            except (AsyncCkptError, OSError) as error:
                raise AssertionError(f"{what}: not called damage: {error!r}") from error
            for key, value in loaded.items():
                assert bits(value) == self.expected[self.step][key], f"wrong values restored: {what}"
