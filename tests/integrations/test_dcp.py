"""``torch.distributed.checkpoint`` through this library keeps the meaning that its own writer and reader give it."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import io
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.testing._internal.two_tensor import TwoTensor

from asyncckpt import Run, UnsupportedValue
from asyncckpt.integrations.dcp import Reader, Writer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Phase(enum.Enum):
    FIRST = 1


class Pair(NamedTuple):
    a: int
    b: str


@dataclasses.dataclass
class Place:
    epoch: int
    at: Pair


class Counter:
    """Keeps a count through torch's protocol of stateful objects."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.loads = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "stream": io.BytesIO(bytes([self.count]))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        assert state["stream"].getvalue() == bytes([self.count])
        self.loads += 1


def stream(content: bytes, at: int) -> io.BytesIO:
    made = io.BytesIO(content)
    made.seek(at)
    return made


def state_of(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    net = nn.Linear(3, 2)
    return {
        "model": net.state_dict(),
        "counter": Counter(seed),
        "stream": stream(b"%d" % seed * 5, seed),
        "nested": {
            "list": [seed, stream(b"x", 0)],
            "path": Path(f"out/{seed}"),
            "since": datetime.date(2026, 1, seed),
        },
        "version": torch.__version__,
        "step": seed,
        "numpy": np.float32(seed),
    }


def check(found: dict[str, Any], seed: int) -> None:
    wanted = state_of(seed)
    assert all(torch.equal(found["model"][key], tensor) for key, tensor in wanted["model"].items())
    assert found["counter"].count == seed
    assert type(found["stream"]) is io.BytesIO
    assert (found["stream"].getvalue(), found["stream"].tell()) == (b"%d" % seed * 5, seed)
    nested = found["nested"]
    assert (nested["list"][0], nested["path"], nested["since"]) == (
        seed,
        Path(f"out/{seed}"),
        datetime.date(2026, 1, seed),
    )
    assert nested["list"][1].getvalue() == b"x"
    assert type(found["version"]) is type(torch.__version__)
    assert (found["step"], found["numpy"], type(found["numpy"])) == (seed, np.float32(seed), np.float32)


def why(error: CheckpointException) -> BaseException:
    (found,) = [one[0] if isinstance(one, tuple) else one for one in error.failures.values()]
    return found


def save(state: dict[str, Any], path: Path, **options: Any) -> Writer:
    writer = Writer(**options)
    dcp.save(state, storage_writer=writer, checkpoint_id=path)
    return writer


def test_streams_stateful_objects_and_other_values_come_back(tmp_path: Path) -> None:
    save(state_of(4), tmp_path / "run" / "step-1")
    state = state_of(7)
    counter, weight = state["counter"], state["model"]["weight"]
    dcp.load(state, storage_reader=Reader(tmp_path / "run"))
    check(state, 4)
    assert (state["counter"] is counter, counter.loads) == (True, 1)
    assert state["model"]["weight"] is weight, "tensors are filled in place"
    assert Run(tmp_path / "run").verify() == []


def test_an_asynchronous_save_holds_the_moment_of_its_call(tmp_path: Path) -> None:
    state = state_of(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = Writer()
        for number in (1, 2):
            before = state_of(3)["model"]
            future: Any = dcp.async_save(state, storage_writer=writer, checkpoint_id=tmp_path / f"step-{number}")
            with torch.no_grad():
                state["model"]["weight"].add_(1)
            state["stream"].seek(0)
            state["stream"].write(b"later")
            future.result()
            state["model"]["weight"].copy_(before["weight"])
            state["stream"] = state_of(3)["stream"]
    writer.close()
    for number in (1, 2):
        loaded = state_of(8)
        dcp.load(loaded, storage_reader=Reader(tmp_path / f"step-{number}"))
        check(loaded, 3)


def test_a_part_of_a_checkpoint_loads_and_a_key_that_is_missing_is_told(tmp_path: Path) -> None:
    save({"a": torch.ones(2), "b": torch.zeros(3), "c": 5}, tmp_path / "step-1")
    part = {"a": torch.zeros(2)}
    dcp.load(part, storage_reader=Reader(tmp_path))
    assert part["a"].tolist() == [1, 1]
    more = {"a": torch.zeros(2), "new": torch.full((1,), 9.0), "c": 0}
    reader = Reader(tmp_path)
    with pytest.raises(CheckpointException, match="new"):
        dcp.load(more, storage_reader=reader)
    reader.close()
    assert (more["a"].tolist(), more["c"]) == ([0, 0], 0), "a load that fails changes nothing"
    dcp.load(more, storage_reader=Reader(tmp_path), planner=DefaultLoadPlanner(allow_partial_load=True))
    assert (more["a"].tolist(), more["new"].tolist(), more["c"]) == ([1, 1], [9], 5)


def test_a_second_save_to_one_path_overwrites_only_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "run" / "best"
    save(state_of(1), path)
    with pytest.raises(CheckpointException) as caught:
        save(state_of(2), path)
    assert "overwrite=True" in str(why(caught.value))
    state = state_of(9)
    dcp.load(state, storage_reader=Reader(path))
    check(state, 1)
    save(state_of(2), path, overwrite=True)
    dcp.load(state, storage_reader=Reader(path))
    check(state, 2)
    assert [entry.name for entry in Run(tmp_path / "run").ls()] == ["best"]


def test_the_order_of_keys_does_not_matter(tmp_path: Path) -> None:
    state = state_of(5)
    save(dict(reversed(state.items())), tmp_path / "step-1")
    found = dict(sorted(state_of(6).items()))
    dcp.load(found, storage_reader=Reader(tmp_path))
    check(found, 5)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-100", 100),
        ("step_00000100", 100),
        ("global_step100", 100),
        ("checkpoint-100", 100),
        ("gpt2-iter_100", 100),
        ("100", 100),
        ("best", 0),
        ("llama-7b", 0),
        ("misstep-7", 0),
        ("step-100-of-1000", 0),
        ("2026-11-27", 0),
    ],
)
def test_a_step_is_what_the_name_says_and_never_just_a_number_in_it(name: str, step: int, tmp_path: Path) -> None:
    save({"a": torch.ones(1)}, tmp_path / name)
    assert [(entry.name, entry.step, entry.damage) for entry in Run(tmp_path).ls()] == [(name, step, None)]


def test_names_without_a_step_count_on(tmp_path: Path) -> None:
    for name in ("step-7", "best", "llama-7b"):
        save({"a": torch.ones(1)}, tmp_path / name)
    assert {entry.name: entry.step for entry in Run(tmp_path).ls()} == {"step-7": 7, "best": 8, "llama-7b": 9}
    save({"a": torch.ones(1)}, tmp_path / "last", step=np.int64(3))
    assert {entry.name: entry.step for entry in Run(tmp_path).ls()}["last"] == 3


def test_stored_bytes_do_not_go_into_a_tensor_that_has_none(tmp_path: Path) -> None:
    save({"a": torch.arange(3.0)}, tmp_path / "step-1")
    live = TwoTensor(torch.zeros(3), torch.zeros(3))
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"a": live}, storage_reader=Reader(tmp_path / "step-1"))
    assert isinstance(why(caught.value), UnsupportedValue)
    assert not live.a.any()


def test_each_save_and_load_has_a_name_of_its_own(tmp_path: Path) -> None:
    writer = save({"a": torch.ones(1)}, tmp_path / "step-1")
    meta, first = writer.storage_meta(), writer.save_id
    assert meta is not None
    assert (meta.save_id, meta.checkpoint_id) == (first, str(tmp_path / "step-1"))
    dcp.save({"a": torch.ones(1)}, storage_writer=writer, checkpoint_id=tmp_path / "step-2")
    assert writer.save_id != first
    reader = Reader(tmp_path)
    ids = set()
    for _ in range(2):
        dcp.load({"a": torch.ones(1)}, storage_reader=reader)
        ids.add(reader.load_id)
        told = reader.read_metadata().storage_meta
        assert told is not None
        assert told.load_id == reader.load_id
    assert len(ids) == 2
    reader.close()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.eye(3).to_sparse(), "to_dense"),
        (lambda: torch.empty(2, dtype=torch.bits8), "safetensors"),
        (lambda: TwoTensor(torch.ones(2), torch.zeros(2)), "__tensor_flatten__"),
        (lambda: len, "plain values"),
        (lambda: Phase.FIRST, "plain values"),
        (lambda: Place(1, Pair(2, "b")), "asdict"),
    ],
    ids=["sparse", "bits", "wrapper", "function", "enum", "dataclass"],
)
def test_what_is_not_stored_is_refused_by_name_and_nothing_is_left(make: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointException) as caught:
        save({"part": {"odd": make(), "a": torch.ones(1)}}, tmp_path / "run" / "step-1")
    error = why(caught.value)
    assert isinstance(error, UnsupportedValue)
    assert "part.odd" in str(error)
    assert words in str(error)
    assert Run(tmp_path / "run").ls() == []
