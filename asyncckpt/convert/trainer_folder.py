"""``export_for_trainer`` makes a folder that the plain ``Trainer`` of Transformers resumes from."""

from __future__ import annotations

import os
import shutil
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from asyncckpt.convert.stored import ORIGIN_FILE, origin_json
from asyncckpt.errors import InvalidOption, RunPathError
from asyncckpt.integrations.output_dir import MODEL, NOTICES, OPTIMIZER, RANDOM, SCALER, SCHEDULER, STATE_ASSET
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.restore.load import load
from asyncckpt.state.rank_names import rank_name
from asyncckpt.storage import local_path
from asyncckpt.storage.posix import PosixOps


def export_for_trainer(checkpoint: OpenCheckpoint, out: str | os.PathLike[str], *, fsdp: bool = False) -> int:
    """Write an open checkpoint of ``AsyncCheckpointMixin`` as a folder that ``Trainer.train(resume_from_checkpoint=…)``
    takes, and return its size in bytes. Call the folder ``checkpoint-N`` for the trainer to find it by itself.
    ``fsdp``: for a trainer with FSDP 2 and full state dicts, its default; others refuse that folder.

    Every byte read is verified, and the folder appears whole or not at all, fsynced. Blocks, and holds the tensors in
    memory. Raises ``InvalidOption`` for a checkpoint that no such trainer wrote whole, ``RunPathError`` (the folder
    exists, or cannot be written) and ``CheckpointDamaged``.
    """
    target = Path(local_path(out))
    if not target.parent.is_dir():
        raise RunPathError(f"{target}: the directory {target.parent} does not exist; create it, or choose another path")
    if os.path.lexists(target):
        raise RunPathError(f"{target} exists; choose another name")
    records = checkpoint.manifest.components
    assets = checkpoint.assets()
    lacking = [name for name in (OPTIMIZER, SCHEDULER, RANDOM) if name not in records]
    if STATE_ASSET not in assets or lacking:
        what = ", ".join(lacking) or STATE_ASSET
        raise InvalidOption(f"{checkpoint.path}: --trainer needs a checkpoint of AsyncCheckpointMixin; it lacks {what}")
    temp = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        temp.mkdir()
        for name, data in assets.items():
            if name not in NOTICES:
                (temp / name).parent.mkdir(parents=True, exist_ok=True)
                (temp / name).write_bytes(data)
        if fsdp:  # there parameters have their names in the optimizer's state, too
            torch.save(_of_fsdp(checkpoint), temp / "pytorch_model_fsdp.bin")
            torch.save(load(checkpoint, OPTIMIZER, None), temp / "optimizer.bin")
        else:
            _write_weights(checkpoint, temp)
            torch.save(_packed(load(checkpoint, OPTIMIZER, None)), temp / "optimizer.pt")
        torch.save(load(checkpoint, SCHEDULER, None), temp / "scheduler.pt")
        if SCALER in records:
            torch.save(load(checkpoint, SCALER, None), temp / "scaler.pt")
        _write_random(checkpoint, temp)
        (temp / ORIGIN_FILE).write_bytes(origin_json(checkpoint))
        nbytes = _sync(temp)
        PosixOps().rename_noreplace(str(temp), str(target))
        PosixOps().fsync_directory(str(target.parent))
    except BaseException as error:
        shutil.rmtree(temp, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunPathError(f"{target}: cannot write here ({error}); choose another path") from error
        raise
    return nbytes


def _write_weights(checkpoint: OpenCheckpoint, folder: Path) -> None:
    """Write each module to the file that the trainer looks for: the model's weights, or those of adapters."""
    for name, record in checkpoint.manifest.components.items():
        if record.kind != "module":
            continue
        state = load(checkpoint, name, None)
        weights = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and k not in record.aliases}
        file = "model.safetensors"
        if name != MODEL:
            prefix = name.removeprefix("adapter").removeprefix("_")
            file = f"{prefix}/adapter_model.safetensors" if prefix else "adapter_model.safetensors"
        (folder / file).parent.mkdir(exist_ok=True)
        save_file(weights, folder / file, metadata={"format": "pt"})


def _of_fsdp(checkpoint: OpenCheckpoint) -> dict[str, Any]:
    """Return the model's weights, tied ones under each of their names. Raises ``InvalidOption`` for adapters."""
    if MODEL not in checkpoint.manifest.components:
        raise InvalidOption(f"{checkpoint.path}: it has adapters, which cannot be exported for FSDP; leave that out")
    return dict(load(checkpoint, MODEL, None))


def _packed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with parameters numbered in the order of its groups, as ``state_dict`` has them."""
    numbers: dict[str, int] = {}
    groups = []
    for group in state["param_groups"]:
        numbers |= {name: len(numbers) + at for at, name in enumerate(group["params"])}
        groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    packed = {numbers[name]: entry for name, entry in state["state"].items()}
    return {**state, "state": dict(sorted(packed.items())), "param_groups": groups}


def _write_random(checkpoint: OpenCheckpoint, folder: Path) -> None:
    """Write the random numbers of each rank as the trainer reads them."""
    there = checkpoint.manifest.components
    alone = checkpoint.manifest.world_size == 1
    for rank in range(checkpoint.manifest.world_size):
        own = rank_name(RANDOM, rank)  # stored where it differs from rank 0's
        state = load(checkpoint, own if own in there else RANDOM, None)
        file = "rng_state.pth" if alone else f"rng_state_{rank}.pth"
        torch.save(_generators(state, alone=alone), folder / file)


def _generators(saved: Mapping[str, Any], *, alone: bool) -> dict[str, Any]:
    python, numpy = saved["python"], saved["numpy"]
    words = struct.unpack(f"<{len(python['words']) // 4}I", python["words"])
    keys = np.frombuffer(numpy["keys"], dtype=np.uint32).copy()
    found: dict[str, Any] = {
        "python": (python["version"], words, python["gauss"]),
        "numpy": (numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]),
        "cpu": _tensor(saved["torch"]),
    }
    if "cuda" in saved:
        current = _tensor(saved["cuda"]["current"])
        found["cuda"] = current if alone else [current]
    return found


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _sync(folder: Path) -> int:
    """Have everything in a folder on the disk; return its size in bytes."""
    nbytes = 0
    for where, _, files in os.walk(folder):
        for file in files:
            with open(os.path.join(where, file), "rb") as opened:
                os.fsync(opened.fileno())
                nbytes += os.fstat(opened.fileno()).st_size
        PosixOps().fsync_directory(where)
    return nbytes
