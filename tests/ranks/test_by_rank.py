"""``Safetensors(per_rank=True)``: a file is one rank's alone; what is restored is what shared files would give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.harness import Crews, Me
from support.parallelisms import SIZES, TIMEOUT
from support.sharded_states import build

import asyncckpt
from ranks.test_elastic import _restore, _save

OPTIONS = {**SIZES, "per_rank": True}
CASES = [
    (2, "ddp", 3, "fsdp2"),
    (4, "fsdp2", 2, "tp"),
    pytest.param((2, "fsdp2", 1, "ddp"), marks=pytest.mark.slow),
    pytest.param((4, "hsdp", 3, "ddp"), marks=pytest.mark.slow),
    (3, "pp", 4, "fsdp2+tp"),
    (2, "ep", 3, "ep"),
    pytest.param((2, "tp", 4, "fsdp2"), marks=pytest.mark.slow),
    (3, "shards", 2, "shards"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-to-{case[2]}-{case[3]}")
def test_files_of_one_rank_each_are_restored_anywhere(
    case: tuple[int, str, int, str], crews: Crews, tmp_path: Path
) -> None:
    before, way, after, other = case
    path = tmp_path / "run"
    crews(before).values(_save, str(path), way, OPTIONS)
    wrong = crews(after).values(_restore, str(path), other, dict(SIZES), before)
    assert not any(wrong), wrong
    assert asyncckpt.Run(path).verify() == []
    shown = {file.name for file in (path / "step-00000007").glob("*.safetensors") if ".rank-" in file.name}
    writers = {int(found.group(1)) for name in shown if (found := re.search(r"\.rank-(\d+)-", name))}
    assert writers == set(range(before)), f"only ranks {writers} have files: {shown}"


def _twice(me: Me, path: str) -> list[int]:
    """Bytes written by the first and the second save of a state that stays as it is."""
    with asyncckpt.Checkpointer(path, files=asyncckpt.Safetensors(per_rank=True), ranks=TIMEOUT) as run:
        state = {"model": build("fsdp2", me.rank, me.size)["model"]}
        return [run.save(step, state).result(60).written_bytes for step in (1, 2)]


def test_a_ranks_file_that_did_not_change_is_linked(crews: Crews, tmp_path: Path) -> None:
    for first, second in crews(2).values(_twice, str(tmp_path / "run")):
        assert second < first // 10, (first, second)
    assert asyncckpt.Run(tmp_path / "run").verify(2) == []


def test_other_tools_open_each_ranks_file(crews: Crews, tmp_path: Path) -> None:
    crews(2).values(_save, str(tmp_path / "run"), "fsdp2", OPTIONS)
    expected = build("ddp", 0, 1)["model"].state_dict()
    rows: dict[str, int] = {}
    for file in (tmp_path / "run" / "step-00000007").glob("model.rank-*.safetensors"):
        with safe_open(file, "pt") as opened:
            for entry in opened.keys():  # noqa: SIM118 (it is no dict)
                name, _, box = entry.removeprefix("model.").partition("[")
                part = opened.get_tensor(entry)
                begin = int(box.split(":")[0]) if box else 0
                whole = expected[name]
                assert torch.equal(part, whole[begin : begin + len(part)] if box else whole)
                rows[name] = rows.get(name, 0) + (len(part) if part.dim() else 1)
    assert rows == {name: len(value) if value.dim() else 1 for name, value in expected.items()}


def test_it_is_for_plain_safetensors_alone(tmp_path: Path) -> None:
    with pytest.raises(asyncckpt.InvalidOption, match="per_rank needs codec='none'"):
        asyncckpt.Safetensors(codec="planes", per_rank=True)
    # alone, there is nothing to divide
    with asyncckpt.Checkpointer(tmp_path / "run", files=asyncckpt.Safetensors(per_rank=True)) as run:
        run.save(1, {"w": torch.arange(9)}).result()
    assert asyncckpt.Run(tmp_path / "run").load_tensors()["w.value"].tolist() == list(range(9))
