"""Lightning's strategies that shard save and resume through asyncckpt, on gloo ranks, as they do by themselves."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits
from frameworks.lightning_sharded import Asked, Ended, Model, again, best, train, validated
from support import harness
from support.harness import Crews

import asyncckpt
from asyncckpt.integrations.lightning import AsyncckptIO, export, load_from_checkpoint

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("default")]
KINDS = ["fsdp2", "fsdp1", "tp", "ddp"]


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


def test_each_rank_goes_on_in_its_own_order_of_data(crews: Crews, tmp_path: Path) -> None:
    unbroken = ended(crews, tmp_path / "plain", ours=False, own_order=True)
    ended(crews, tmp_path, own_order=True, epochs=2)  # which saves in the middle of an epoch
    assert states(ended(crews, tmp_path, own_order=True, ckpt_path="last")) == states(unbroken)
    outcomes = crews(3).run(train, Asked(folder=str(tmp_path), own_order=True, ckpt_path="last"))
    assert all("another place in their data" in one.message for one in outcomes), outcomes


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


def test_last_one_that_was_not_finished_gives_way_to_the_one_before_and_others_do_not(
    crews: Crews, tmp_path: Path
) -> None:
    unbroken = ended(crews, tmp_path, checkpoints={"save_top_k": -1})
    shutil.rmtree(tmp_path / "asyncckpt-run" / "step-00000018")
    path = str(tmp_path / "epoch=3-step=18.ckpt")
    outcomes = crews(2).run(train, Asked(folder=str(tmp_path), ckpt_path=path))
    assert all(one.failed_with("CheckpointNotFound") for one in outcomes), outcomes
    resumed = ended(crews, tmp_path, ckpt_path="last", checkpoints={"save_top_k": -1})
    assert states(resumed) == states(unbroken)


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
        assert saved.keys() - found.keys() <= {"rng+1", "loaders+1"}
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


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "ddp"])
def test_plain_lightnings_checkpoint_goes_on_with_ours(kind: str, crews: Crews, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"kind": kind, "dropout": 0.0}
    ended(crews, tmp_path / "plain", ours=False, epochs=2, **asked)
    path = str(tmp_path / "plain" / "last.ckpt")
    expected = ended(crews, tmp_path / "expected", ours=False, seed=5, ckpt_path=path, **asked)
    assert states(ended(crews, tmp_path / "ours", seed=6, ckpt_path=path, **asked)) == states(expected)
    assert names(tmp_path / "ours") == names(tmp_path / "expected")


def test_plain_lightnings_directory_in_the_place_of_a_save_stays_and_all_ranks_say_so(
    crews: Crews, tmp_path: Path
) -> None:
    ended(crews, tmp_path, ours=False, epochs=2)
    before = sorted(path.name for path in (tmp_path / "last.ckpt").iterdir())
    for options in ({}, {"save_top_k": 0}):  # Lightning saves one step twice, or once
        outcomes = crews(2).run(train, Asked(folder=str(tmp_path), ckpt_path="last", checkpoints=options))
        assert all(one.failed_with("RunPathError") for one in outcomes), outcomes
    assert sorted(path.name for path in (tmp_path / "last.ckpt").iterdir()) == before


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "ddp"])
def test_plain_lightning_refuses_ours_as_it_is_and_goes_on_with_an_export(
    kind: str, crews: Crews, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"kind": kind, "dropout": 0.0}
    ended(crews, tmp_path, epochs=2, **asked)
    expected = ended(crews, tmp_path, seed=5, ckpt_path="last", **asked)
    ended(crews, tmp_path / "short", epochs=2, **asked)
    path, out = tmp_path / "short" / "last.ckpt", tmp_path / "exported.ckpt"
    outcomes = crews(2).run(train, Asked(folder=str(tmp_path / "refused"), ours=False, ckpt_path=str(path), **asked))
    assert not any(one.ok for one in outcomes)
    export(path, out)
    found = ended(crews, tmp_path / "plain", ours=False, seed=6, ckpt_path=str(out), **asked)
    for one in (*found, *expected):
        del one.state["random"]
    assert states(found) == states(expected)
    whole = load_from_checkpoint(Model, path, asked=Asked(folder="", **asked))
    stored = asyncckpt.Run(tmp_path / "short" / "asyncckpt-run").load(component="model")
    assert bits(whole.state_dict()) == bits(stored)
    optimizer = whole.configure_optimizers()[0][0]
    optimizer.load_state_dict(AsyncckptIO().load_checkpoint(path)["optimizer_states"][0])
    moments = asyncckpt.Run(tmp_path / "short" / "asyncckpt-run").load(component="optimizer")["state"]
    named = dict(whole.named_parameters())
    assert {name: bits(optimizer.state[named[name]]["exp_avg"]) for name in moments} == {
        name: bits(values["exp_avg"]) for name, values in moments.items()
    }


@pytest.mark.parametrize(
    "options",
    [
        {"monitor": "loss", "save_top_k": 2, "save_last": True, "every_n_train_steps": 2},
        {"monitor": "loss", "save_top_k": 1, "save_last": "link", "every_n_train_steps": 4},
        {"save_top_k": 0, "save_last": True},
    ],
    ids=str,
)
def test_model_checkpoint_leaves_the_same_names_and_what_it_removes_goes(
    options: dict[str, Any], crews: Crews, tmp_path: Path
) -> None:
    for ours in (False, True):
        ended(crews, tmp_path / str(ours), ours=ours, dropout=0.0, checkpoints=options)
    assert names(tmp_path / "True") == names(tmp_path / "False")
    entries = asyncckpt.Run(tmp_path / "True" / "asyncckpt-run").ls()
    live = {AsyncckptIO().load_checkpoint(tmp_path / "True" / name)["global_step"] for name in names(tmp_path / "True")}
    assert {entry.step for entry in entries} == live | {entries[-1].step}
    assert len(entries) == len({entry.step for entry in entries}), "a step that was saved twice lies there twice"


def test_callback_saves_on_all_ranks_and_resumes(crews: Crews, tmp_path: Path) -> None:
    unbroken = ended(crews, tmp_path / "plain", ours=False)
    ended(crews, tmp_path, every=4, epochs=3)
    assert [entry.step for entry in asyncckpt.Run(tmp_path / "run").ls()] == [4, 8, 12]
    found = ended(crews, tmp_path, every=4, seed=5, ckpt_path=str(tmp_path / "run"))
    assert states(found) == states(unbroken)


def test_callback_refuses_plain_lightnings_strategies(crews: Crews, tmp_path: Path) -> None:
    outcomes = crews(2).run(train, Asked(folder=str(tmp_path), ours=False, every=4))
    assert all(one.failed_with("InvalidOption") for one in outcomes), outcomes


def test_validation_takes_the_model_alone(crews: Crews, tmp_path: Path) -> None:
    ended(crews, tmp_path, checkpoints={"save_weights_only": True})
    asked = Asked(folder=str(tmp_path), seed=5, ckpt_path=str(tmp_path / "last.ckpt"))
    found = crews(2).values(validated, asked)
    whole = AsyncckptIO().load_checkpoint(tmp_path / "last.ckpt")
    assert "optimizer_states" not in whole
    parts = [weights["net.0.weight"] for _, weights in found]
    assert bits(torch.cat(parts)) == bits(whole["state_dict"]["net.0.weight"])
    assert found[0][0] == found[1][0]


def test_weights_that_were_not_saved_stay_only_where_loading_is_not_strict(crews: Crews, tmp_path: Path) -> None:
    ended(crews, tmp_path, epochs=2)
    for strict in (True, False):
        asked = Asked(folder=str(tmp_path), extra=True, strict=strict, ckpt_path=str(tmp_path / "last.ckpt"))
        outcomes = crews(2).run(validated, asked)
        assert [one.failed_with("StateMismatch") for one in outcomes] == [strict] * 2, outcomes
    stored = asyncckpt.Run(tmp_path / "asyncckpt-run").load(component="model")["net.0.weight"]
    assert bits(torch.cat([one.value[1]["net.0.weight"] for one in outcomes])) == bits(stored)


def test_best_loads_after_training_and_can_be_saved_again(crews: Crews, tmp_path: Path) -> None:
    options = {"monitor": "loss", "mode": "max", "save_last": False, "save_top_k": 1}
    found = crews(2).values(best, Asked(folder=str(tmp_path), checkpoints=options))
    name = found[0][0]
    assert names(tmp_path) == sorted(["after.ckpt", name])
    wanted = bits(AsyncckptIO().load_checkpoint(tmp_path / name)["state_dict"])
    assert bits(torch.cat([weights["net.0.weight"] for _, weights in found])) == wanted["net.0.weight"]
    assert bits(AsyncckptIO().load_checkpoint(tmp_path / "after.ckpt")["state_dict"]) == wanted


def test_plugins_options_hold(crews: Crews, tmp_path: Path) -> None:
    ended(crews, tmp_path, options={"files": "zarr", "config": {"width": 33}})
    run = asyncckpt.Run(tmp_path / "asyncckpt-run")
    assert run.config() == {"width": 33}
    assert list(Path(run.newest().path).rglob("zarr.json"))


def test_weights_alone_are_no_training_to_go_on_with(crews: Crews, tmp_path: Path) -> None:
    ended(crews, tmp_path, epochs=2, checkpoints={"save_weights_only": True})
    outcomes = crews(2).run(train, Asked(folder=str(tmp_path), ckpt_path="last"))
    assert all(one.failed_with("StateMismatch") for one in outcomes), outcomes


def test_another_optimizer_than_was_saved_is_refused(crews: Crews, tmp_path: Path) -> None:
    ended(crews, tmp_path, epochs=2)
    outcomes = crews(2).run(train, Asked(folder=str(tmp_path), groups=1, ckpt_path="last"))
    assert all(one.failed_with("StateMismatch") for one in outcomes), outcomes


def test_other_weights_that_a_hook_puts_in_are_refused(crews: Crews, tmp_path: Path) -> None:
    for hook in (looks, adds):
        ended(crews, tmp_path / hook.__name__, hook=hook, epochs=1)
    read = AsyncckptIO().load_checkpoint(tmp_path / "adds" / "last.ckpt")
    assert read["mine"] == {"a": 1}
    for hook in (replaces, drops):
        outcomes = crews(2).run(train, Asked(folder=str(tmp_path / hook.__name__), hook=hook))
        assert all(one.failed_with("InvalidOption") for one in outcomes), outcomes


def looks(checkpoint: dict[str, Any]) -> None:
    assert "net.0.weight" in checkpoint["state_dict"]
    assert checkpoint["optimizer_states"][0]["param_groups"]


def adds(checkpoint: dict[str, Any]) -> None:
    checkpoint["mine"] = {"a": 1}


def replaces(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"] = dict(checkpoint["state_dict"])


def drops(checkpoint: dict[str, Any]) -> None:
    del checkpoint["state_dict"]["net.0.weight"]


def test_checkpoint_of_a_strategy_that_does_not_shard_needs_an_export(crews: Crews, tmp_path: Path) -> None:
    AsyncckptIO().save_checkpoint({"global_step": 1, "state_dict": {"w": torch.ones(3)}}, tmp_path / "last.ckpt")
    outcomes = crews(2).run(train, Asked(folder=str(tmp_path), ckpt_path="last"))
    assert all(one.failed_with("InvalidOption") for one in outcomes), outcomes


def test_checkpoint_that_rank_0_has_saved_alone_goes_on_with_ddp_on_all_ranks(crews: Crews, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"kind": "ddp", "dropout": 0.0}
    unbroken = ended(crews, tmp_path / "plain", ours=False, **asked)
    ended(crews, tmp_path, ours=False, options={"config": 1}, epochs=2, **asked)
    found = ended(crews, tmp_path, seed=5, ckpt_path="last", **asked)
    for one in (*found, *unbroken):
        del one.state["random"]
    assert states(found) == states(unbroken)
    assert "loaders" in asyncckpt.Run(tmp_path / "asyncckpt-run").load()  # which rank 0 alone does not save


def test_what_keeps_one_rank_from_saving_ends_the_training_of_all(crews: Crews, tmp_path: Path) -> None:
    outcomes = crews(2).run(train, Asked(folder=str(tmp_path), hook=spoils), timeout=30)
    assert [one.error[:1] for one in outcomes] == [("UnsupportedValue",)] * 2, outcomes
    assert "rank 1: " in outcomes[0].message
    assert [entry.step for entry in asyncckpt.Run(tmp_path / "asyncckpt-run").ls()] == [3]


def spoils(checkpoint: dict[str, Any]) -> None:
    if torch.distributed.get_rank() == 1 and checkpoint["global_step"] > 3:
        checkpoint["mine"] = object()
