"""Tensors as they come, for round trips through other formats, and the two verbs as functions."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import torch
import xxhash
from hypothesis import strategies as st

from asyncckpt import Checkpointer, Run
from asyncckpt.convert.exporting import Exported
from asyncckpt.convert.formats import export_checkpoint, import_checkpoint
from asyncckpt.convert.importing import Imported
from asyncckpt.state.dtypes import CODES

DTYPES = tuple(CODES)
SHAPES = ((), (0,), (3, 0, 2), (1,), (7,), (5, 4), (2, 3, 4), (1, 1, 1, 3))


def tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0, layout: str = "plain") -> torch.Tensor:
    """Make a tensor of random bits, so of odd values, too; ``layout`` says how it lies in memory."""
    generator = torch.Generator().manual_seed(seed)
    turned = shape[::-1] if layout == "transposed" else shape
    count = int(torch.Size(turned).numel())
    if dtype == torch.bool:
        made = torch.randint(0, 2, (count,), generator=generator).bool()
    else:
        data = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        made = data.view(dtype) if count else torch.empty(0, dtype=dtype)
    made = made.reshape(turned)
    if layout == "transposed":
        return made.permute(*reversed(range(len(shape)))) if shape else made
    if layout == "strided" and shape:
        wide = torch.stack([made, made], dim=-1)
        return wide[..., 0]
    return made


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> dict[str, torch.Tensor]:
    """Dicts of tensors by name: of any dtype and shape, empty and 0-dimensional ones, strided and tied ones."""
    names = draw(st.lists(st.from_regex(r"[a-z]{1,4}(\.[a-z0-9]{1,3}){0,2}", fullmatch=True), min_size=1, unique=True))
    found: dict[str, torch.Tensor] = {}
    for number, name in enumerate(names[:6]):
        layout = draw(st.sampled_from(["plain", "plain", "transposed", "strided"]))
        found[name] = tensor(draw(st.sampled_from(dtypes)), draw(st.sampled_from(SHAPES)), number, layout)
    if draw(st.booleans()):
        found["tied.to"] = found[next(iter(found))]
    return found


class Holder(torch.nn.Module):
    """A module whose ``state_dict`` is what it is given."""

    def __init__(self, held: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.held = held

    def state_dict(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return dict(self.held)


def saved(path: Path, state: dict[str, Any], step: int = 1, **options: Any) -> Run:
    """Save a state, and return the run."""
    with Checkpointer(path) as run:
        run.save(step, state, **options).result()
    return Run(path)


def exported(run: Run, out: Path, **options: Any) -> Exported:
    with contextlib.closing(run.open()) as checkpoint:
        return export_checkpoint(checkpoint, out, **options)


def imported(source: Path, run: Path, **options: Any) -> tuple[Run, Imported]:
    """Import as step 1, and see that what was written verifies, and says what it was made of."""
    done = import_checkpoint(source, run, 1, **options)
    found = Run(run)
    assert found.verify(1) == []
    with found.open(1) as checkpoint:
        recorded: Any = checkpoint.manifest.environment["imported"]
    assert recorded == done.source
    assert recorded["path"] == str(source.absolute())
    folder = source if source.is_dir() else source.parent
    read = {name: (folder / name).read_bytes() for name in recorded["files"]}
    assert read, "no file is recorded"
    for name, data in read.items():
        digest = {"xxh3-128": xxhash.xxh3_128(data).hexdigest(), "sha256": hashlib.sha256(data).hexdigest()}
        assert recorded["files"][name].items() <= {"nbytes": len(data), **digest}.items(), name
        assert len(recorded["files"][name]) == 2, name
    return found, done


def origin_of(run: Run) -> dict[str, str]:
    """What an export should record of the newest checkpoint."""
    with contextlib.closing(run.open()) as checkpoint:
        manifest = (Path(checkpoint.path) / "manifest.json").read_bytes()
        digest = "sha256:" + hashlib.sha256(manifest).hexdigest()
        step = str(checkpoint.manifest.step)
        return {"asyncckpt.source": checkpoint.path, "asyncckpt.step": step, "asyncckpt.manifest": digest}


def bits(value: Any) -> Any:
    """A value in which tensors are replaced by their exact bytes, dtype and shape; empty ones may have any strides."""
    if isinstance(value, torch.Tensor):
        dense = torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
        return str(value.dtype), tuple(value.shape), dense.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return value


def module_bits(run: Run, component: str = "model") -> Any:
    return bits(dict(run.load(component=component)))
