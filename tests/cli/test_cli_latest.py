"""``latest`` is the same checkpoint for every verb, and none hands out an older one in its place."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from asyncckpt import Checkpointer, Run
from asyncckpt.cli.app import app

#: Every verb that takes a checkpoint; ``{out}`` is a file that it may write.
VERBS = {
    "verify": ["verify", "{run}", "latest"],
    "show": ["show", "{run}", "latest"],
    "diff a": ["diff", "{run}", "latest", "10"],
    "diff b": ["diff", "{run}", "10", "latest"],
    "export": ["export", "{run}", "latest", "{out}"],
    "pin": ["pin", "{run}", "latest"],
    "unpin": ["unpin", "{run}", "latest"],
}
#: Those of them that read tensors, and so find damage that a look at names and sizes does not show.
READING = ("verify", "diff a", "diff b", "export")


@pytest.fixture
def saved(tmp_path: Path) -> str:
    with Checkpointer(tmp_path / "run") as run:
        for step in (
            10,
            20,
            30,
        ):  # another model each time: equal files would be links, and share damage
            run.save(step, {"model": torch.nn.Linear(4, 4), "step": step}).result()
    return str(tmp_path / "run")


def call(run: str, arguments: list[str], *more: str) -> Any:
    out = str(Path(run).with_name("out.safetensors"))
    return CliRunner().invoke(app, [one.format(run=run, out=out) for one in arguments] + list(more))


def _cut_short(run: str, step: int) -> None:
    os.truncate(Path(run, f"step-{step:08d}", "state.json"), 3)


def _flip(run: str, name: str) -> None:
    shard = next(Path(run, name).glob("model-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def _step_of(verb: str, run: str) -> int:
    result = call(run, VERBS[verb], "--json")
    assert result.exit_code == 0, result.output
    parsed = json.loads(result.stdout)
    return int((parsed[0] if verb == "verify" else parsed)["step"])


@pytest.mark.parametrize("verb", ["verify", "show", "export", "pin", "unpin"])
def test_latest_is_the_full_checkpoint_that_was_saved_last(saved: str, verb: str) -> None:
    with Checkpointer(saved) as run:
        run.save(40, {"model": torch.nn.Linear(4, 4)}, weights_only=True).result()
    shutil.copytree(Path(saved, "step-00000030"), Path(saved, "my-copy-of-it"))
    assert _step_of(verb, saved) == 30


def test_latest_of_a_run_that_went_back_is_what_was_saved_last_not_the_largest_step(saved: str) -> None:
    state = {"model": torch.nn.Linear(4, 4), "step": 0}
    with Checkpointer(saved) as run:
        run.restore(state, step=10)
        run.save(15, state).result()
    assert [entry.step for entry in Run(saved).ls()][-1] == 15
    assert {_step_of(verb, saved) for verb in ("verify", "show", "export", "pin")} == {15}


@pytest.mark.parametrize("verb", ["verify", "show", "export"])
def test_latest_of_a_run_of_weights_alone_is_its_last(tmp_path: Path, verb: str) -> None:
    path = str(tmp_path / "run")
    with Checkpointer(path) as run:
        for step in (1, 2):
            run.save(step, {"model": torch.nn.Linear(4, 4)}, weights_only=True).result()
    assert _step_of(verb, path) == 2


@pytest.mark.parametrize("verb", VERBS)
def test_a_damaged_latest_is_reported_or_refused_never_replaced_by_an_older_one(saved: str, verb: str) -> None:
    _cut_short(saved, 30)
    result = call(saved, VERBS[verb])
    assert result.exit_code == 1, result.output
    assert "step-00000030" in result.output
    assert "state.json" in result.output
    if verb != "verify":
        assert len(result.stderr.splitlines()) == 1
        assert "the newest usable one is 20" in result.stderr
    assert not Path(saved).with_name("out.safetensors").exists()
    assert not any(entry.pinned for entry in Run(saved).ls())


@pytest.mark.parametrize("verb", READING)
def test_damage_that_only_reading_shows_is_no_reason_for_an_older_one_either(saved: str, verb: str) -> None:
    _flip(saved, "step-00000030")
    result = call(saved, VERBS[verb])
    assert result.exit_code == 1, result.output
    assert "step-00000030" in result.output
    assert verb == "verify" or "the newest usable one is 20" in result.stderr


def test_damage_of_a_named_step_is_not_blamed_on_latest(saved: str) -> None:
    _flip(saved, "step-00000010")
    for verb in ("diff a", "diff b"):
        result = call(saved, VERBS[verb])
        assert result.exit_code == 1
        assert "step-00000010" in result.stderr
        assert "latest" not in result.stderr


def test_the_default_is_latest(saved: str) -> None:
    _cut_short(saved, 30)
    for verb in ("show", "verify"):
        assert call(saved, [verb, "{run}"]).exit_code == 1
        assert call(saved, [verb, "{run}", "20"]).exit_code == 0


def test_where_nothing_is_usable_the_refusal_says_so(saved: str) -> None:
    for step in (10, 20, 30):
        _cut_short(saved, step)
    result = call(saved, VERBS["show"])
    assert result.exit_code == 1
    assert "no other one of this run is usable" in result.stderr


@pytest.mark.parametrize("verb", ["verify", "show", "export", "pin"])
def test_a_run_of_copies_has_no_latest(saved: str, verb: str) -> None:
    for step in (10, 20):
        shutil.rmtree(Path(saved, f"step-{step:08d}"))
    Path(saved, "step-00000030").rename(Path(saved, "best"))
    result = call(saved, VERBS[verb])
    assert result.exit_code == 3, result.output
    assert "no checkpoint of its own" in result.stderr
