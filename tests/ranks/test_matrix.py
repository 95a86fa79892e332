"""World size, parallelism, format: whoever writes a state, the data files are the same, byte for byte."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.harness import Crews, Me
from support.options import by_stage
from support.parallelisms import FORMATS, SIZES, TIMEOUT, save_in_each
from support.report_table import TABLE
from support.sharded_states import PARALLELISMS, Net, build, possible

import asyncckpt

#: Cells that say no, and have to: what nobody can write, or gather, alone.
REFUSED = {("pp", "safetensors/planes"), *(("shards", one) for one in FORMATS if one != "safetensors/none")}
SIZES_OF_JOBS = (2, 3, 4, 8)
CELLS = [(size, way) for size in SIZES_OF_JOBS for way in PARALLELISMS if possible(way, size)]
#: What every run looks at; the rest is slow.
SAMPLE = {
    2: FORMATS,
    3: ("safetensors/none",),
    4: ("safetensors/none", "zarr/planes"),
    8: ("safetensors/none",),
}
SAMPLED = {
    (size, way)
    for size, way in CELLS
    if size == 2 or (size == 4 and not possible(way, 2)) or (way, size) in {("fsdp2", 3), ("shards", 4), ("fsdp2", 8)}
}


@pytest.fixture(scope="module")
def alone(crews: Crews, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What one process, which has never heard of ranks, writes: kind of state → format → SHA-256."""
    folder = tmp_path_factory.mktemp("alone")
    found: dict[str, dict[str, str]] = {}
    for way in ("ddp", "shards"):
        (folder / way).mkdir()
        found[way] = crews(1).values(save_in_each, str(folder / way), way, FORMATS)[0]
        for form in FORMATS:
            TABLE.note(way, form, 1, "alone")
    return found


def _compare(
    size: int, way: str, formats: tuple[str, ...], crews: Crews, alone: dict[str, dict[str, str]], path: Path
) -> None:
    expected = alone["shards" if way == "shards" else "ddp"]
    found = crews(size).values(save_in_each, str(path), way, formats, timeout=120)
    for form in formats:
        if size > 1 and (way, form) in REFUSED:
            assert all(one[form].startswith("refused: ") and "use format=" in one[form].lower() for one in found)
            TABLE.note(way, form, size, "refused")
            continue
        same = found[0][form] == expected[form]
        TABLE.note(way, form, size, "equal" if same else "DIFFERENT")
    different = [form for form in formats if (way, form) not in REFUSED and found[0][form] != expected[form]]
    assert not different, f"{size} ranks, {way}: other bytes than one process writes in {different}"


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("size", "way"), [cell for cell in CELLS if cell in SAMPLED])
def test_data_files_are_those_of_one_process(
    size: int, way: str, crews: Crews, alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    _compare(size, way, SAMPLE[size], crews, alone, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("size", "way"), CELLS)
def test_data_files_are_those_of_one_process_in_every_format(
    size: int, way: str, crews: Crews, alone: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    _compare(size, way, FORMATS, crews, alone, tmp_path)


def _interleaved(me: Me, path: str) -> str:
    """Virtual pipeline stages: each rank holds every second layer."""
    torch.manual_seed(0)
    model = Net()
    for number, (name, _) in enumerate(list(model.named_children())):
        if number % me.size != me.rank:
            delattr(model, name)
    with asyncckpt.Checkpointer(path, **by_stage(ranks=TIMEOUT, **SIZES)) as run:
        return run.save(1, {"model": model}).result(30).path


def test_stages_dealt_out_in_turns_give_every_rank_its_own_layers_back(crews: Crews, tmp_path: Path) -> None:
    path = crews(2).values(_interleaved, str(tmp_path / "run"))[0]
    assert asyncckpt.Run(tmp_path / "run").verify() == []
    torch.manual_seed(0)
    stored = asyncckpt.Run(tmp_path / "run").load_tensors()
    expected = Net().state_dict()
    assert {name.removeprefix("model.") for name in stored} == set(expected)
    assert all(torch.equal(stored[f"model.{name}"], value) for name, value in expected.items())
    assert os.path.isdir(path)


def _save(me: Me, path: str, way: str) -> None:
    with asyncckpt.Checkpointer(path, **by_stage(ranks=TIMEOUT, **SIZES)) as run:
        run.save(1, build(way, me.rank, me.size)).result(60)


@pytest.fixture
def of_fsdp(crews: Crews, tmp_path: Path) -> Path:
    crews(2).values(_save, str(tmp_path / "run"), "fsdp2")
    return tmp_path / "run" / "step-00000001"


def test_safetensors_of_an_fsdp2_run_open_as_they_are(of_fsdp: Path) -> None:
    expected: dict[str, Any] = build("ddp", 0, 1)["model"].state_dict()
    found: dict[str, torch.Tensor] = {}
    for file in sorted(of_fsdp.glob("model-*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
