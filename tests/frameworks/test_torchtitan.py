"""torchtitan's manager over asyncckpt keeps the contract of torchtitan's own, with FSDP2 on two gloo ranks."""

from __future__ import annotations

import os
import queue
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import bits
from frameworks.torchtitan_trainings import Asked, Ended, train
from support import harness
from support.harness import Crews

import asyncckpt
from asyncckpt.storage import open_store

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("torchtitan") is None, reason="torchtitan has an environment of its own: Makefile"),
]


@pytest.fixture(scope="module")
def crews() -> Iterator[Crews]:
    harness.CONTEXT.set_forkserver_preload(
        ["torch._dynamo", "torchtitan.components.checkpointer", "asyncckpt.checkpointer"]
    )
    kept = Crews()
    yield kept
    kept.close()


def ended(crews: Crews, ranks: int = 2, **asked: Any) -> Ended:
    found: Ended = crews(ranks).values(train, Asked(**asked), timeout=300)[0]
    return found


def state(one: Ended) -> Any:
    return bits([one.model, one.optimizer, one.schedule])


def directories(folder: Path) -> list[str]:
    return sorted(one.name for one in (folder / "saved").iterdir() if one.is_dir())


def test_resumed_training_ends_as_the_unbroken_one(crews: Crews, tmp_path: Path) -> None:
    whole = ended(crews, folder=str(tmp_path / "whole"), ours=False)
    ended(crews, folder=str(tmp_path), last=5)
    assert directories(tmp_path) == ["step-2", "step-4"]
    again = ended(crews, folder=str(tmp_path), seed=3)
    assert (again.loaded, again.first) == (True, 4)
    assert state(again) == state(whole)


def test_killed_in_the_middle_of_saves_it_resumes_and_ends_as_the_unbroken_one(crews: Crews, tmp_path: Path) -> None:
    whole = ended(crews, folder=str(tmp_path / "whole"))
    chosen = int(os.environ.get("ASYNCCKPT_SEED", "0")) or random.Random(os.urandom(8)).randrange(1 << 30)
    for point in random.Random(chosen).sample(range(2, whole.calls), 4):
        folder = str(tmp_path / f"killed-{point}")
        crew = crews(2)
        crew.start(train, Asked(folder=folder, kill=(0, point)))
        outcomes = crew.collect(60, without=[1])  # who waits for its peer
        assert outcomes[0].gone, (outcomes, chosen)
        assert state(ended(crews, folder=folder)) == state(whole), (point, chosen)


def test_another_number_of_ranks_goes_on_as_with_torchtitans_own_manager(crews: Crews, tmp_path: Path) -> None:
    for ours in (False, True):
        ended(crews, 3, folder=str(tmp_path / str(ours)), ours=ours, last=4)
    found, expected = (ended(crews, 2, folder=str(tmp_path / str(ours)), ours=ours, seed=5) for ours in (True, False))
    assert found.first == expected.first == 4
    assert state(found) == state(expected)


def test_own_checkpoints_of_torchtitan_go_on_and_are_kept(crews: Crews, tmp_path: Path) -> None:
    whole = ended(crews, folder=str(tmp_path / "whole"))
    ended(crews, folder=str(tmp_path), ours=False, last=4)
    again = ended(crews, folder=str(tmp_path), seed=2, config={"keep_latest_k": 2}, last=6)
    assert again.first == 4
    assert state(again) == state(whole)
    assert directories(tmp_path) == ["step-2", "step-4", "step-6"]


def test_interval_first_step_and_keep_latest_k_hold(crews: Crews, tmp_path: Path) -> None:
    config = {"interval": 3, "keep_latest_k": 2, "enable_first_step_checkpoint": True}
    ended(crews, folder=str(tmp_path), last=4, config=config)
    assert directories(tmp_path) == ["step-1", "step-3"]
    ended(crews, folder=str(tmp_path), last=9, config=config)
    assert directories(tmp_path) == ["step-6", "step-9"]


def test_load_step_and_exclude_from_loading_and_load_only(crews: Crews, tmp_path: Path) -> None:
    ended(crews, folder=str(tmp_path))
    found = ended(crews, folder=str(tmp_path), step=4, last=0, config={"load_only": True})
    assert found.first == 4
    without = {"exclude_from_loading": ["optimizer", "lr_scheduler"], "load_only": True}
    partly = ended(crews, folder=str(tmp_path), step=4, last=0, seed=8, config=without)
    assert (partly.first, partly.schedule) == (4, {"last_epoch": 0})
    assert bits(partly.model) == bits(found.model)
    assert not partly.optimizer
    assert directories(tmp_path) == ["step-2", "step-4", "step-6"]
    outcomes = crews(2).run(train, Asked(folder=str(tmp_path), config={"exclude_from_loading": ["nobody"]}))
    assert all(one.failed_with("ValueError") for one in outcomes)
    outcomes = crews(2).run(train, Asked(folder=str(tmp_path), step=3))
    assert all(one.failed_with("FileNotFoundError") for one in outcomes), outcomes


@pytest.mark.parametrize("model_only", [True, False])
def test_last_save(model_only: bool, crews: Crews, tmp_path: Path) -> None:
    config = {"last_save_model_only": model_only, "export_dtype": "float32"}
    last = ended(crews, folder=str(tmp_path), last=5, end=True, dtype=torch.bfloat16, config=config)
    name = "weights-step-5" if model_only else "step-5"
    assert name in directories(tmp_path)
    found = asyncckpt.Run(tmp_path / "saved").load_tensors(5)
    kind = torch.float32 if model_only else torch.bfloat16
    expected = {f"model.{key}": value.to(kind) for key, value in last.model.items()}
    assert bits({key: found[key] for key in expected}) == bits(expected)
    again = ended(crews, folder=str(tmp_path), last=0, dtype=torch.bfloat16, config={"load_only": True})
    assert again.first == (4 if model_only else 5)


def test_seed_checkpoint_gives_the_model_alone(crews: Crews, tmp_path: Path) -> None:
    made = ended(crews, 1, folder=str(tmp_path), last=0)
    found = ended(crews, folder=str(tmp_path), seed=9, last=0, config={"load_only": True})
    assert (found.loaded, found.first) == (True, 0)
    assert bits(found.model) == bits(made.model)


def test_disabled_manager_does_nothing_and_dcps_modes_are_refused(crews: Crews, tmp_path: Path) -> None:
    ended(crews, folder=str(tmp_path), config={"enable": False})
    assert not (tmp_path / "saved").exists()
    outcomes = crews(2).run(train, Asked(folder=str(tmp_path), config={"async_mode": "async"}))
    assert all(one.failed_with("InvalidOption") for one in outcomes), outcomes


def test_torchtitans_own_manager_takes_no_hidden_name_of_ours_for_a_checkpoint(tmp_path: Path) -> None:
    from torchtitan.components.checkpointer.dcp import CheckpointManager

    store = open_store(tmp_path)
    for step in (2, 4, 6):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        (folder / ".metadata").write_bytes(b"")
    hidden = [store.set_aside("step-6"), store.make_way("step-4", "a" * 32).hidden]  # type: ignore[attr-defined]
    purged: queue.Queue[str] = queue.Queue()
    manager: Any = CheckpointManager.__new__(CheckpointManager)
    vars(manager).update(folder=str(tmp_path), keep_latest_k=1, purge_thread=object(), purge_queue=purged)
    assert manager._find_load_step() == 2
    with patch("torch.distributed.get_rank", lambda: 0):
        manager._purge_stale_checkpoints()
    assert purged.empty(), "it would delete them"
    assert all((tmp_path / name / ".metadata").exists() for name in hidden)
