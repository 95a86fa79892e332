"""Checkpoints of ZeRO in, made by hand: parts that end within parameters, frozen and shared ones, nothing executed."""

from __future__ import annotations

import enum
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from support.foreign import bits, imported, module_bits

from asyncckpt import CheckpointDamaged
from asyncckpt.convert.formats import import_checkpoint

SHAPES = {"a.weight": (3, 5), "a.bias": (5,), "none": (0, 2), "b": (7, 2, 1)}


_CONFIG = types.ModuleType("deepspeed.runtime.zero.config")
ZeroStageEnum = enum.IntEnum("ZeroStageEnum", {"first": 1, "second": 2, "third": 3}, module=_CONFIG.__name__)
_CONFIG.ZeroStageEnum = ZeroStageEnum  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _pickled_as_deepspeed_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage is an object of a class of DeepSpeed's in its files, which are read where that is not installed."""
    parts = _CONFIG.__name__.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    monkeypatch.setitem(sys.modules, _CONFIG.__name__, _CONFIG)


class _Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def _write(folder: Path, stage: int, ranks: int, **more: Any) -> dict[str, torch.Tensor]:
    weights = _weights()
    frozen = torch.arange(5.0)
    state = {
        "module": {"buffer": torch.arange(3), "half": torch.ones(2).bfloat16()},
        "buffer_names": ["buffer", "half"],
        "param_shapes": [{name: torch.Size(shape) for name, shape in SHAPES.items()}],
        "frozen_param_shapes": {"frozen": torch.Size([5])},
        "shared_params": {"tied": "b"},
        "ds_version": "0.19",
        **more,
    }
    (folder / "global_step3").mkdir(parents=True)
    (folder / "latest").write_text("global_step3")
    share = -(-5 // ranks)
    for rank in range(ranks):
        if stage == 3:
            padded = torch.cat([frozen, torch.zeros(share * ranks - 5)])
            state["frozen_param_fragments"] = {"frozen": padded[rank * share : (rank + 1) * share].clone()}
            torch.save(state, folder / "global_step3" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            pieces = []
            for value in weights.values():
                each = -(-value.numel() // ranks)
                flat = torch.cat([value.reshape(-1), torch.zeros(each * ranks - value.numel())])
                pieces.append(flat[rank * each : (rank + 1) * each])
            whole = torch.cat(pieces)
            groups = {"fp32_flat_groups": [whole[:4].clone(), whole[4:].clone()]}
        else:
            state["frozen_param_fragments"] = {"frozen": frozen}
            torch.save(state, folder / "global_step3" / "mp_rank_00_model_states.pt")
            flat = torch.cat([value.reshape(-1) for value in weights.values()])
            flat = torch.cat([flat, torch.zeros(-flat.numel() % (2 * ranks))])
            each = flat.numel() // ranks
            groups = {"single_partition_of_fp32_groups": [flat[rank * each : (rank + 1) * each].clone()]}
        optimizer = {
            "zero_stage": ZeroStageEnum(stage),
            "partition_count": ranks,
            "moments": {"x": torch.ones(9)},
            **groups,
        }
        torch.save(
            {"optimizer_state_dict": optimizer, "scaler": _Attack(folder / "executed")},
            folder / "global_step3" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    return {**weights, "tied": weights["b"], "frozen": frozen, "buffer": torch.arange(3), "half": torch.ones(2)}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parts_of_ranks_are_put_together_and_nothing_is_executed(stage: int, ranks: int, tmp_path: Path) -> None:
    wanted = _write(tmp_path / "in", stage, ranks)
    run, done = imported(tmp_path / "in", tmp_path / "run")
    assert module_bits(run) == bits(wanted)
    assert not (tmp_path / "in" / "executed").exists()
    assert any(f"ZeRO {stage}, {ranks} ranks" in note and "not taken" in note for note in done.notes)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_rank_or_a_shape_that_does_not_fit_is_damage(stage: int, tmp_path: Path) -> None:
    _write(tmp_path / "in", stage, 2)
    (tmp_path / "in" / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointDamaged, match=r"of 2 ranks has the files of 1"):
        import_checkpoint(tmp_path / "in", tmp_path / "run", 1)
    _write(tmp_path / "odd", stage, 2, param_shapes=[{"a.weight": torch.Size([300, 5])}])
    with pytest.raises(CheckpointDamaged, match=r"a.weight is not all there"):
        import_checkpoint(tmp_path / "odd", tmp_path / "run", 1)
    (tmp_path / "odd" / "latest").write_text("../in")
    with pytest.raises(CheckpointDamaged, match=r"no directory beside it"):
        import_checkpoint(tmp_path / "odd", tmp_path / "run", 1, format="deepspeed")
