"""``torch.distributed.checkpoint`` through this library's writer and reader, and checkpoints that plain DCP wrote."""

from __future__ import annotations

import os
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.harness import Crews, Fault, Me
from torch import nn
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

from asyncckpt import AsyncCkptError, CheckpointDamaged, InvalidOption, Run, UnsupportedValue
from asyncckpt.cli.app import app
from asyncckpt.convert.dcp import convert
from asyncckpt.convert.dcp.native_reader import read_foreign
from asyncckpt.integrations.dcp import Reader, Writer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEP = 7


def model(seed: int) -> nn.Module:
    """Odd sizes: shards are uneven, and some ranks have none of a bias."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(37, 53), nn.LayerNorm(53), nn.Linear(53, 3))


def state_of(seed: int, size: int = 1) -> dict[str, Any]:
    net = model(seed)
    if size > 1:
        fully_shard(net[0])
        fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    weights, moments = get_state_dict(net, optimizer)
    return {"model": weights, "optim": moments, "step": STEP, "meta": {"name": f"seed {seed}", "sizes": [1, 2.5]}}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every leaf; tensors whole. Collective where there are DTensors."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}").items()}
    if isinstance(value, list):
        return {k: v for at, item in enumerate(value) for k, v in flat(item, f"{name}.{at}").items()}
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value}


def save(me: Me, path: str, seed: int, **options: Any) -> dict[str, Any]:
    state = state_of(seed, me.size)
    dcp.save(state, storage_writer=Writer(path, step=STEP, **options))
    return flat(state)


def load(me: Me, path: str) -> tuple[dict[str, Any], int, int]:
    state = state_of(99, me.size) | {"step": 0, "meta": {"name": "", "sizes": [0, 0.0]}}
    reader = Reader(path)
    dcp.load(state, storage_reader=reader)
    mine = sum(
        t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes
        for part in (state["model"], *state["optim"]["state"].values())
        for t in part.values()
    )
    return flat(state), reader.read_bytes, mine


@pytest.mark.parametrize(("before", "after"), [(1, 1), (4, 2), (2, 4), (4, 1)])
def test_what_dcp_saved_loads_on_any_number_of_ranks(before: int, after: int, crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    saved = crews(before).values(save, path, 1)[0]
    run = Run(path)
    assert [(entry.step, entry.damage) for entry in run.ls()] == [(STEP, None)]
    assert run.verify() == []
    for found, read, held in crews(after).values(load, path):
        assert found == saved
        assert read <= held + (64 << 10), "read more than what lies on this rank"
    if before == 4:
        files = sorted(file.name for file in (tmp_path / "run" / f"step-{STEP:08d}").glob("*.safetensors"))
        assert files == [f"rank-{rank:05d}-00001-of-00001.safetensors" for rank in range(4)]


def test_a_module_and_a_dict_restore_from_it_without_dcp(crews: Crews, tmp_path: Path) -> None:
    saved = crews(4).values(save, str(tmp_path / "run"), 1)[0]
    net = model(99)
    state: dict[str, Any] = {"model": net, "optim": {}, "step": 0, "meta": {}}
    Run(tmp_path / "run").restore(state)
    found = flat({"model": dict(net.state_dict()), **{key: state[key] for key in ("optim", "step", "meta")}})
    assert found == saved


def _load_apart(me: Me, path: str) -> None:
    load(me, f"{path}-{me.rank}")


def test_ranks_that_would_load_different_checkpoints_do_not(crews: Crews, tmp_path: Path) -> None:
    crew = crews(2)
    for rank in range(2):
        crew.values(save, str(tmp_path / f"run-{rank}"), rank)
    outcomes = crew.run(_load_apart, str(tmp_path / "run"))
    assert all("another checkpoint than rank 0" in one.trace for one in outcomes)


def test_safetensors_opens_every_ranks_file(crews: Crews, tmp_path: Path) -> None:
    from safetensors import safe_open

    crews(2).values(save, str(tmp_path / "run"), 1)
    names: set[str] = set()
    for file in (tmp_path / "run").glob("step-*/*.safetensors"):
        with safe_open(file, "pt") as opened:
            names.update(opened.keys())
    assert {"model.0.weight[0:27,0:37]", "model.0.weight[27:53,0:37]"} <= names


def _async_twice(me: Me, path: str) -> dict[str, Any]:
    state = state_of(1, me.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = Writer()
        for step in (1, 2):
            expected = flat(state)
            future: Any = dcp.async_save(state, storage_writer=writer, checkpoint_id=f"{path}/step-{step}")
            with torch.no_grad():
                for tensor in state["model"].values():
                    tensor += 1  # training goes on; what was staged stays
            future.result()
    writer.close()
    return expected


def test_async_save_stages_in_the_writers_own_memory(crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    expected = crews(2).values(_async_twice, path)[0]
    found, _, _ = crews(2).values(load, f"{path}/step-2")[0]
    assert found == expected
    assert [entry.name for entry in Run(path).ls()] == ["step-1", "step-2"]


class _Struck(DefaultSavePlanner):
    """Comes to a point at the third tensor that is written."""

    def __init__(self, me: Me) -> None:
        super().__init__()
        self.me = me

    def resolve_data(self, write_item: Any) -> Any:
        self.me.at("write")
        return super().resolve_data(write_item)


def _save_struck(me: Me, path: str) -> None:
    dcp.save(state_of(2, me.size), storage_writer=Writer(path, step=STEP + 1), planner=_Struck(me))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_leaves_nothing_published(rank: int, crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    crew = crews(2)
    before = crew.values(save, path, 1)[0]
    fault = Fault(rank, "write", "raise", 3, OSError(28, "No space left on device"))
    outcomes = crew.run(_save_struck, path, fault=fault)
    assert all(one.failed_with("CheckpointException") for one in outcomes), outcomes
    assert [entry.step for entry in Run(path).ls()] == [STEP]
    assert crew.values(load, path)[0][0] == before
    crew.values(_save_struck, path)
    assert [entry.step for entry in Run(path).ls()] == [STEP, STEP + 1]
    assert not [name for name in os.listdir(path) if name.startswith(".tmp-")]


def test_a_rank_that_is_killed_leaves_nothing_published(crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    crew = crews(2)
    crew.values(save, path, 1)
    crew.start(_save_struck, path, fault=Fault(1, "write", "kill", 3))
    outcomes = crew.collect(30)
    crew.close()
    assert outcomes[1].gone
    assert not outcomes[0].ok
    assert [entry.step for entry in Run(path).ls()] == [STEP]
    crews(2).values(_save_struck, path)
    assert [entry.step for entry in Run(path).ls()] == [STEP, STEP + 1]


def _why(error: CheckpointException) -> list[BaseException]:
    return [one[0] if isinstance(one, tuple) else one for one in error.failures.values()]


def test_damage_is_seen_before_a_load_uses_it(tmp_path: Path) -> None:
    dcp.save(state_of(1), storage_writer=Writer(tmp_path / "run", step=STEP))
    file = next((tmp_path / "run").glob("step-*/rank-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state_of(2), storage_reader=Reader(tmp_path / "run"))
    assert any(isinstance(error, CheckpointDamaged) for error in _why(caught.value))
    assert Run(tmp_path / "run").verify() != []


def test_mistakes_are_typed_and_publish_nothing(tmp_path: Path) -> None:
    state = state_of(1)
    dcp.save(state, storage_writer=Writer(tmp_path / "run", step=STEP))
    mistakes: list[tuple[Any, dict[str, Any], str]] = [
        (state, {"storage_writer": Writer(tmp_path / "run", step=STEP)}, "already exists"),
        (state | {"f": print}, {"storage_writer": Writer(tmp_path / "run", step=8)}, "f"),
        (state, {"storage_writer": Writer(tmp_path / "run")}, "which step"),
        (state, {"storage_writer": Writer()}, "say where"),
    ]
    for mistaken, options, words in mistakes:
        with pytest.raises(CheckpointException) as caught:
            dcp.save(mistaken, **options)
        assert any(isinstance(error, AsyncCkptError) and words in str(error) for error in _why(caught.value)), words
    assert [entry.step for entry in Run(tmp_path / "run").ls()] == [STEP]
    dcp.save(state_of(3), storage_writer=Writer(tmp_path / "run", step=STEP, overwrite=True))
    found, _, _ = load(Me(0, 1), str(tmp_path / "run"))
    assert found == flat(state_of(3))


class _Caching(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(enable_plan_caching=True)


def test_cached_plans_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    dcp.save(state_of(1), storage_writer=Writer(tmp_path / "run", step=1), planner=_Caching())
    with pytest.raises(CheckpointException) as caught:
        dcp.save(state_of(1), storage_writer=Writer(tmp_path / "run", step=2), planner=_Caching())
    assert any(isinstance(error, InvalidOption) for error in _why(caught.value))
    assert [entry.step for entry in Run(tmp_path / "run").ls()] == [1]


# -- checkpoints of plain DCP ------------------------------------------------------------------------------------------


def _save_plain(me: Me, path: str) -> dict[str, Any]:
    state = state_of(5, me.size)
    dcp.save(state, checkpoint_id=path)
    return flat(state)


@pytest.mark.parametrize("size", [1, 4])
def test_what_plain_dcp_wrote_is_converted_bit_for_bit(size: int, crews: Crews, tmp_path: Path) -> None:
    saved = crews(size).values(_save_plain, str(tmp_path / "plain"))[0]
    done = convert(tmp_path / "plain", tmp_path / "run", 41)
    assert (done.step, dict(done.skipped)) == (41, {})
    assert Run(tmp_path / "run").verify(41) == []
    assert crews(2).values(load, str(tmp_path / "run"))[0][0] == saved


class _Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_malicious_checkpoint_executes_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(3), "evil": _Attack(marker)}, checkpoint_id=tmp_path / "values")
        dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "metadata")
    (tmp_path / "metadata" / ".metadata").write_bytes(pickle.dumps(_Attack(marker)))
    with pytest.raises(CheckpointDamaged):
        convert(tmp_path / "metadata", tmp_path / "run", 1)
    with pytest.raises(UnsupportedValue, match="evil"):
        convert(tmp_path / "values", tmp_path / "run", 1)
    assert not marker.exists()
    called = CliRunner().invoke(
        app, ["convert", str(tmp_path / "values"), str(tmp_path / "run"), "1", "--skip-unsupported", "--json"]
    )
    assert called.exit_code == 0, called.output
    assert '"evil"' in called.output
    assert not marker.exists()
    assert Run(tmp_path / "run").load_tensors(1)["model.w"].tolist() == [1, 1, 1]


def test_mutated_checkpoints_of_plain_dcp_give_typed_errors_only(tmp_path: Path) -> None:
    dcp.save(state_of(5), checkpoint_id=tmp_path / "plain")
    files = [tmp_path / "plain" / ".metadata", next((tmp_path / "plain").glob("*.distcp"))]
    rng = random.Random(1)
    refused = 0
    for number in range(600):
        file = files[number % 2]
        whole = file.read_bytes()
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            if rng.random() < 0.2:
                del data[at : at + rng.randrange(1, 200)]
            else:
                data[at] = rng.randrange(256)
        file.write_bytes(data)
        try:
            read_foreign(tmp_path / "plain")
        except AsyncCkptError:
            refused += 1
        finally:
            file.write_bytes(whole)
    assert refused > 100
