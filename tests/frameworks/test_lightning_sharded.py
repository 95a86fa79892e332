"""Lightning's strategies that shard save and resume through asyncckpt, on gloo ranks, as they do by themselves."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits
from frameworks.lightning_sharded import Asked, Ended, again, train, validated
from support import harness
from support.harness import Crews

import asyncckpt
from asyncckpt.integrations.lightning import AsyncckptIO, export, load_from_checkpoint

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("default")]
KINDS = ["fsdp2", "fsdp1", "tp"]


@pytest.fixture(scope="module")
def crews() -> Iterator[Crews]:
    harness.CONTEXT.set_forkserver_preload(["torch._dynamo", "frameworks.lightning_sharded"])
    kept = Crews()
    yield kept
    kept.close()


def ended(crews: Crews, folder: Path, ranks: int = 2, **asked: Any) -> list[Ended]:
    found: list[Ended] = crews(ranks).values(train, Asked(folder=str(folder), **asked), timeout=120)
    return found


def states(found: list[Ended]) -> Any:
    return bits([one.state for one in found])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.ckpt"))


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_ends_as_plain_lightnings_unbroken_one(kind: str, crews: Crews, tmp_path: Path) -> None:
    unbroken = ended(crews, tmp_path / "plain", kind=kind, ours=False)
    ended(crews, tmp_path / "ours", kind=kind, epochs=2)
    resumed = ended(crews, tmp_path / "ours", kind=kind, seed=5, ckpt_path="last")
    assert [one.step for one in resumed] == [20, 20]
    assert states(resumed) == states(unbroken)


def test_killed_in_the_middle_of_saves_it_resumes_and_ends_as_the_unbroken_one(crews: Crews, tmp_path: Path) -> None:
    whole = ended(crews, tmp_path / "whole")
    seed = int(os.environ.get("ASYNCCKPT_SEED", "0")) or random.Random(os.urandom(8)).randrange(1 << 30)
    for rank in (0, 1, 0):
        point = random.Random(seed + rank).randrange(2, whole[rank].calls)
        folder = tmp_path / f"killed-{len(os.listdir(tmp_path))}"
        crew = crews(2)
        crew.start(train, Asked(folder=str(folder), ckpt_path="last", kill=(rank, point)))
        outcomes = crew.collect(60, without=[1 - rank])  # who waits for its peer
        assert outcomes[rank].gone, (outcomes, seed)
        crew.close()
        assert states(ended(crews, folder, ckpt_path="last")) == states(whole), (rank, point, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_ranks_has_the_same_state(kind: str, crews: Crews, tmp_path: Path) -> None:
    sizes = (2, 1) if kind == "tp" else (2, 3, 1)
    ended(crews, tmp_path, sizes[0], kind=kind, epochs=3)
    run = tmp_path / "asyncckpt-run"
    saved = asyncckpt.Run(run).load()
    for size in sizes[1:]:
        asked = Asked(folder=str(tmp_path), kind=kind, epochs=3, seed=size, ckpt_path="last")
        crews(size).values(again, asked, f"again-{size}.ckpt")
        found = asyncckpt.Run(run).load(f"again-{size}.ckpt")
        assert saved.keys() - found.keys() <= {"rng+1"}
        for part in ("model", "optimizer"):
            assert bits(found[part]) == bits(saved[part]), part


def test_another_number_of_ranks_goes_on_as_plain_lightning_does(crews: Crews, tmp_path: Path) -> None:
    for ours in (False, True):
        ended(crews, tmp_path / str(ours), 3, ours=ours, epochs=2, dropout=0.0)
    asked: dict[str, Any] = {"seed": 5, "ckpt_path": "last", "dropout": 0.0}
    found, expected = (ended(crews, tmp_path / str(ours), 2, ours=ours, **asked) for ours in (True, False))
    for one in (*found, *expected):
        del one.state["random"]  # plain Lightning brings none back
    assert [one.step for one in found] == [20, 20]
    assert states(found) == states(expected)


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_plain_lightnings_checkpoint_goes_on_with_ours(kind: str, crews: Crews, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"kind": kind, "dropout": 0.0}
    ended(crews, tmp_path / "plain", ours=False, epochs=2, **asked)
    expected = ended(crews, tmp_path / "plain", ours=False, seed=5, ckpt_path="last", **asked)
    path = str(next((tmp_path / "plain").glob("epoch=1*.ckpt")))
    assert states(ended(crews, tmp_path / "ours", seed=6, ckpt_path=path, **asked)) == states(expected)
    assert len(names(tmp_path / "ours")) == 2
