"""What is read of files by rank that parts of a manifest list, by another number of ranks than wrote them, and by
those who read what ranks have of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import Crews, Me
from support.options import by_stage
from support.parallelisms import SIZES
from support.sharded_states import build, local

import asyncckpt
from asyncckpt.manifest.parts import part_name
from ranks.test_elastic import MOST, _read_wide, _wide
from ranks.test_manifest_parts import PARTS, _said
from ranks.test_manifest_parts import _save as _save_steps


def _save_wide(me: Me, path: str, way: str) -> None:
    files = asyncckpt.Safetensors(per_rank=True)
    with asyncckpt.Checkpointer(path, ranks=PARTS, files=files) as run:
        run.save(1, _wide(me, way)).result(60)


@pytest.mark.parametrize(("saved_by", "restored_by"), [(4, 1), (4, 3), (2, 3)])
def test_a_rank_reads_little_more_than_its_part(saved_by: int, restored_by: int, crews: Crews, tmp_path: Path) -> None:
    crews(saved_by).values(_save_wide, str(tmp_path / "run"), "fsdp2")
    assert len(list((tmp_path / "run").glob("step-*/part-*"))) == saved_by
    found = crews(restored_by).values(_read_wide, str(tmp_path / "run"), "fsdp2")
    ratios = [round(read / needed, 3) for read, needed in found]
    assert max(ratios) <= MOST, f"bytes read by each rank against its part: {ratios}"


# -- tensors of a rank's own -------------------------------------------------------------------------------------------


class _Own:
    """Has tensors of each rank, more than one file holds, some tied, and some that are not row-major."""

    def __init__(self, rank: int) -> None:
        table = torch.full((300_000,), float(rank))
        columns = torch.full((2, 3, 4, 4), rank + 0.5).to(memory_format=torch.channels_last)
        self.state = {"table": table, "tied": table, "columns": columns, "rank": rank, "none": torch.empty(0)}
        self.state |= {f"more{number}": torch.full((700, 300), rank * 10.0 + number) for number in range(4)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def _state(me: Me) -> dict[str, Any]:
    parts = {}
    for number in range(6):
        low, high = (1001 * at // me.size for at in (me.rank, me.rank + 1))
        whole = torch.arange(1001 * 3.0).reshape(1001, 3) + number
        parts[f"w{number}"] = asyncckpt.LocalShard(whole[low:high].clone(), (1001, 3), (low, 0))
    return {"own": asyncckpt.PerRank(_Own(me.rank), _taken_in_turn), "shards": parts}


def _taken_in_turn(states: list[Any], rank: int, _size: int) -> Any:
    return states[rank % len(states)]


def _save(me: Me, path: str) -> None:
    with asyncckpt.Checkpointer(path, **by_stage(ranks=PARTS, per_rank=True, **SIZES)) as run:
        run.save(1, _state(me)).result(60)


def _restore(me: Me, path: str) -> dict[str, Any]:
    state = _state(me)
    state["own"].value.state = {}
    for shard in state["shards"].values():
        shard.tensor.zero_()
    with asyncckpt.Checkpointer(path, **by_stage(ranks=PARTS, per_rank=True, **SIZES)) as run:
        run.restore(state)
    mine = _state(me)["shards"]
    assert all(torch.equal(shard.tensor, mine[name].tensor) for name, shard in state["shards"].items())
    found: dict[str, Any] = state["own"].value.state
    return found


@pytest.mark.parametrize("after", [3, 1, 4])
def test_tensors_of_a_ranks_own_come_back(after: int, crews: Crews, tmp_path: Path) -> None:
    crews(3).values(_save, str(tmp_path / "run"))
    assert asyncckpt.Run(tmp_path / "run").verify() == []
    for rank, found in enumerate(crews(after).values(_restore, str(tmp_path / "run"))):
        expected = _Own(rank % 3).state
        assert found.keys() == expected.keys()
        assert found["rank"] == rank % 3
        assert all(torch.equal(found[name], value) for name, value in expected.items() if name != "rank")


def test_shown_tensors_include_those_of_a_ranks_own(crews: Crews, tmp_path: Path) -> None:
    crews(2).values(_save, str(tmp_path / "run"))
    assert "own+1.more3" in _said("show", str(tmp_path / "run"), "--tensors")
    listed = json.loads(_said("show", str(tmp_path / "run"), "--tensors", "--json"))["components"]
    assert listed["own+1"]["list"]["table"]["shape"] == [300_000]
    brief = json.loads(_said("show", str(tmp_path / "run"), "--json"))["components"]
    assert brief["own+1"]["nbytes"] >= listed["own+1"]["nbytes"] > 4_000_000
    assert brief["own+1"]["tensors"] is None, "parts were read to count tensors"


def test_what_many_tensors_have_in_common_is_listed_once(crews: Crews, tmp_path: Path) -> None:
    crews(3).values(_save, str(tmp_path / "run"))
    (root,) = (tmp_path / "run").glob("step-*/manifest.json")
    assert len(json.loads(root.read_bytes())["spreads"]) == 1, "six LocalShards are dealt out alike"


# -- torch.distributed.checkpoint --------------------------------------------------------------------------------------


def _load_with_dcp(me: Me, path: str) -> tuple[list[str], set[str]]:
    """Return which tensors are not what was saved, and the parts that were read."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    from asyncckpt.integrations.dcp import Reader
    from asyncckpt.storage.reader import LocalReader

    read: set[str] = set()
    read_small = LocalReader.read_small

    def counting(self: LocalReader, file: str, limit_bytes: int) -> bytes:
        read.add(file)
        return read_small(self, file, limit_bytes)

    live = get_model_state_dict(build("fsdp2", me.rank, me.size)["model"])
    expected = {f"model.{name}": local(value).clone() for name, value in live.items()}
    state = {f"model.{name}": value for name, value in live.items()}
    with torch.no_grad():
        for value in state.values():
            local(value).fill_(-1)
    LocalReader.read_small = counting  # type: ignore[method-assign]
    try:
        dcp.load(state, storage_reader=Reader(path))
    finally:
        LocalReader.read_small = read_small  # type: ignore[method-assign]
    wrong = [name for name, value in expected.items() if not torch.equal(local(state[name]), value)]
    return wrong, {name for name in read if name.startswith("part-")}


def test_dcp_loads_it_and_reads_the_parts_of_this_ranks_rows(crews: Crews, tmp_path: Path) -> None:
    crews(4).values(_save_steps, str(tmp_path / "run"), "fsdp2")
    for rank, (wrong, read) in enumerate(crews(4).values(_load_with_dcp, str(tmp_path / "run"))):
        assert not wrong
        assert part_name(rank) in read <= {part_name(0), part_name(rank)}
    for wrong, _ in crews(3).values(_load_with_dcp, str(tmp_path / "run")):
        assert not wrong
