"""Going back to an earlier step: what was acknowledged last is the newest, nothing goes before its successor came."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.branches import saved, state, steps, value
from support.examples import examples

from asyncckpt import (
    Checkpointer,
    InvalidStep,
    KeepBest,
    KeepEvery,
    KeepLast,
    Run,
    RunOptions,
    StepExists,
    WriterOptions,
)
from asyncckpt.manifest import json as manifests
from asyncckpt.testing import FaultyOps


def without_sequence(path: Path) -> None:
    """As an earlier version wrote it."""
    for folder in path.glob("step-*"):
        file = folder / manifests.FILE_NAME
        old = manifests.decode(file.read_bytes(), "here")
        data = manifests.encode(type(old)(**{name: getattr(old, name) for name in old.__slots__} | {"sequence": 0}))
        assert b'"sequence"' not in data
        file.write_bytes(data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_retention_keeps_what_was_saved_last_not_what_has_the_largest_steps(path: Path) -> None:
    saved(path, *range(1, 13))
    with Checkpointer(path, keep=KeepLast(3)) as run:
        run.restore(state(0), step=5)
        for step, expected in ((6, [11, 12, 6]), (7, [12, 6, 7]), (8, [6, 7, 8])):
            run.save(step, state(100 + step)).result()
            run.wait()
            assert [entry.step for entry in run.ls()] == expected
    assert value(path) == 108
    with Checkpointer(path) as run:
        assert run.resume(state(0)) == 8
    assert (path / "latest").read_text().strip() == "step-00000008"


def test_a_new_process_resumes_from_what_was_acknowledged_last(path: Path) -> None:
    saved(path, *range(1, 13))
    with Checkpointer(path) as run:
        run.restore(state(0), step=5)
        run.save(6, state(106)).result()
    live = state(0)
    with Checkpointer(path) as run:
        assert run.resume(live) == 6
        assert live["meta"]["value"] == 106
        for step in range(7, 14):  # over the steps of the branch that the process before had left
            run.save(step, state(100 + step)).result()
    assert steps(path) == [*range(1, 6), *range(6, 14)]
    assert [value(path, step) for step in range(1, 14)] == [*range(1, 6), *range(106, 114)]
    assert Run(path).verify() == []


def test_going_back_as_the_first_call_of_a_process(path: Path) -> None:
    saved(path, 5, 12)
    with Checkpointer(path, every=1) as run:
        run.restore(state(0), step=5)
        assert run.step(6, state(106)) is not None
        run.save(12, state(112)).result()
    assert (steps(path), value(path, 12)) == ([5, 6, 12], 112)


def test_a_step_that_retention_deleted_is_free(path: Path) -> None:
    with Checkpointer(path, keep=[KeepLast(2), KeepEvery(5)]) as run:
        for step in range(1, 9):
            run.save(step, state(step)).result()
        run.wait()
        run.restore(state(0), step=5)
        run.save(6, state(106)).result()
    assert value(path) == 106


def test_going_back_and_forth_again(path: Path) -> None:
    saved(path, 1, 2, 3)
    with Checkpointer(path) as run:
        run.restore(state(0), step=1)
        run.restore(state(0), step=3)
        with pytest.raises(StepExists, match="step 3 is already saved"):
            run.save(3, state(103))
        with pytest.raises(StepExists, match="step 2 is already saved"):
            run.save(2, state(102))
        with pytest.raises(InvalidStep, match="the newest is 3"):
            run.save(0, state(100))
        run.save(4, state(4)).result()
    assert [value(path, step) for step in (1, 2, 3, 4)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "partly",
    [
        lambda run, path: run.restore({"w": torch.zeros(700, dtype=torch.int64)}, step=1),
        lambda run, path: run.restore(state(0), step=1, include=["w"]),
        lambda run, path: run.restore(state(0) | {"new": torch.zeros(3)}, step=1, strict=False),
        lambda run, path: Run(path).restore(state(0), step=1),
        lambda run, path: run.load_tensors(1),
    ],
)
def test_restoring_a_part_sends_training_nowhere(path: Path, partly: Any) -> None:
    saved(path, 1, 2)
    with Checkpointer(path) as run:
        partly(run, path)
        with pytest.raises(StepExists, match="already saved"):
            run.save(2, state(102)).result()
        with pytest.raises(InvalidStep, match=r"restore\(state, step=…\) the whole state"):
            run.save(0, state(100)).result()
        run.save(3, state(3)).result()
    assert [value(path, step) for step in (1, 2, 3)] == [1, 2, 3]


def test_a_weights_only_checkpoint_sends_training_nowhere(path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    with Checkpointer(path) as run:
        run.save(1, {"m": model}, weights_only=True).result()
        run.save(2, {"m": model}).result()
        run.restore({"m": model}, step=1)
        with pytest.raises(StepExists):
            run.save(2, {"m": model})


def test_weights_of_the_branch_that_was_given_up_make_way_too(path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    with Checkpointer(path) as run:
        run.save(1, {"m": model}).result()
        run.save(2, {"m": model}, weights_only=True).result()
        run.save(3, {"m": model}).result()
        run.restore({"m": model}, step=1)
        torch.nn.init.constant_(model.bias, 7.0)
        run.save(2, {"m": model}, weights_only=True).result()
    assert Run(path).load_tensors(2)["m.bias"].tolist() == [7.0] * 3
    assert sorted(os.listdir(path))[-3:] == ["step-00000001", "step-00000003", "weights-step-00000002"]


def test_a_save_that_fails_leaves_what_it_was_to_replace(path: Path) -> None:
    saved(path, 1, 2, 3)
    with Checkpointer(path) as run:
        run.restore(state(0), step=1)
        ops = run._store.ops = FaultyOps()
        ops.fail = ("rename_noreplace", 2, errno.EIO)  # the first makes room, the second publishes
        assert run.save(2, state(102)).exception(30) is not None
        assert ops.seen >= 2, "the step before it had not made way"
        assert [entry.step for entry in run.ls()] == [1, 2, 3]
        assert value(path, 2) == 2
        ops.fail = None
        run.save(2, state(102)).result()
    assert (steps(path), value(path)) == ([1, 3, 2], 102)
    assert not [name for name in os.listdir(path) if name.startswith((".replaced", ".trash", ".tmp"))]


def test_what_makes_way_is_deleted_only_once_its_successor_is_durable(path: Path) -> None:
    saved(path, 1, 2)
    with Checkpointer(path) as run:
        run.restore(state(0), step=1)
        ops = run._store.ops = FaultyOps()
        run.save(2, state(102)).result()
        run.wait()
    moves = [
        (call, name) for call, name in ops.log if call in ("rename_noreplace", "fsync_directory") and "tmp" not in name
    ]
    hidden = next(n for n, (call, name) in enumerate(moves) if name.startswith(".replaced-step~00000002-"))
    published = moves.index(("rename_noreplace", "step-00000002"))
    gone = next(n for n, (call, name) in enumerate(moves) if name.startswith(".trash-.replaced~step~00000002~"))
    assert hidden < published < gone
    for earlier, later in ((hidden, published), (published, gone)):
        assert ("fsync_directory", "run") in moves[earlier:later], "not durable before what comes after it"


def test_a_killed_process_leaves_the_step_it_was_to_replace(path: Path) -> None:
    saved(path, 1, 2)
    Run(path)._store.make_way("step-00000002", "a" * 32)
    assert steps(path) == [1]
    with Checkpointer(path) as run:
        assert run.resume(state(0)) == 2
        assert [entry.step for entry in run.ls()] == [1, 2]
    assert value(path, 2) == 2


def test_what_an_earlier_version_had_hidden_gets_its_name_back(path: Path) -> None:
    saved(path, 1, 2)
    (path / "step-00000002").rename(path / f".replaced-step-00000002-{'a' * 32}")  # the name is as it was, there
    with Checkpointer(path) as run:
        assert run.resume(state(0)) == 2
    assert value(path, 2) == 2


@pytest.mark.parametrize("veil", ["-", "~"])
def test_what_had_made_way_goes_where_its_successor_is_there(path: Path, veil: str) -> None:
    saved(path, 1, 2)
    attempt = Run(path).ls()[-1].attempt
    shutil.copytree(path / "step-00000001", path / f".replaced-step{veil}00000002-{attempt}")
    saved(path, 3)
    assert not list(path.glob(".replaced-*"))
    assert [value(path, step) for step in (1, 2, 3)] == [1, 2, 3]


def test_what_had_made_way_stays_where_its_successor_is_damaged(path: Path) -> None:
    saved(path, 1, 2)
    attempt = Run(path).ls()[-1].attempt
    hidden = path / f".replaced-step~00000002-{attempt}"
    shutil.copytree(path / "step-00000001", hidden)
    (path / "step-00000002" / "state.json").write_text("short")
    with Checkpointer(path) as run, pytest.warns(RuntimeWarning):
        run.resume(state(0))
    assert hidden.is_dir()


def test_what_is_read_while_it_is_replaced_goes_with_the_next_save(path: Path) -> None:
    saved(path, 1, 2)
    reader = Run(path).open(2)
    with Checkpointer(path) as run:
        run.restore(state(0), step=1)
        run.save(2, state(102)).result()
        run.wait()
        assert len(list(path.glob(".replaced-*"))) == 1
        assert reader.reader.read_small("state.json", 1 << 20)
        reader.close()
        run.save(3, state(103)).result()
        run.wait()
        assert not list(path.glob(".replaced-*"))


def test_a_step_whose_new_name_is_another_is_there_once(path: Path) -> None:
    with Checkpointer(path, run=RunOptions(name="step_{step}_loss_{loss:.2f}")) as run:
        for step in (1, 2, 3):
            run.save(step, state(step), metrics={"loss": step}).result()
        run.restore(state(0), step=1)
        run.save(2, state(102), metrics={"loss": 0.5}).result()
    assert [entry.name for entry in Run(path).ls()] == ["step_1_loss_1.00", "step_3_loss_3.00", "step_2_loss_0.50"]
    assert value(path) == value(path, 2) == 102


def test_of_manifests_without_a_number_the_step_decides_and_all_others_are_newer(path: Path) -> None:
    saved(path, 3, 7, 12, keep=())
    without_sequence(path)
    assert steps(path) == [3, 7, 12]
    assert value(path) == 12
    with Checkpointer(path, keep=KeepLast(2)) as run:
        run.restore(state(0), step=3)
        run.save(4, state(104)).result()
    assert (steps(path), value(path)) == ([12, 4], 104)


def test_the_best_stay_whatever_branch_they_are_of_until_their_step_is_reached(path: Path) -> None:
    with Checkpointer(path, keep=[KeepLast(1), KeepBest("loss", mode="min")]) as run:
        for step, loss in ((1, 3.0), (2, 0.5), (3, 2.0)):
            run.save(step, state(step), metrics={"loss": loss}).result()
        run.wait()
        run.restore(state(0), step=2)
        run.save(3, state(103), metrics={"loss": 1.0}).result()
        run.wait()
        assert [entry.step for entry in run.ls()] == [2, 3]


def test_a_damaged_newest_falls_back_to_what_was_saved_before_it_not_to_a_later_step(path: Path) -> None:
    saved(path, 1, 2, 3, incremental=False)
    with Checkpointer(path, writer=WriterOptions(reuse_unchanged=False)) as run:
        run.restore(state(0), step=1)
        run.save(2, state(102)).result()
        run.save(3, state(103)).result()
        run.save(4, state(104)).result()
    (path / "step-00000004" / "manifest.json").write_text("{}")
    assert steps(path) == [1, 2, 3, 4], "nobody knows when it was saved: after the newest step up to its own"
    with Checkpointer(path) as run:
        with pytest.warns(RuntimeWarning):
            assert run.resume(state(0)) == 3
        run.save(4, state(204)).result()
    assert value(path) == 204


def test_saves_in_flight_when_training_goes_back_are_of_the_branch_that_is_given_up(path: Path) -> None:
    with Checkpointer(path) as run:
        run.save(1, state(1)).result()
        pending = run.save(2, state(2))
        run.restore(state(0), step=1)
        run.save(2, state(102)).result()
        pending.result()
    assert (steps(path), value(path)) == ([1, 2], 102)


def test_an_overwriting_run_goes_back_too(path: Path) -> None:
    saved(path, 1, 2, 3)
    with Checkpointer(path, keep=KeepLast(2), run=RunOptions(overwrite=True)) as run:
        run.restore(state(0), step=1)
        run.save(2, state(102)).result()
    assert (steps(path), value(path)) == ([3, 2], 102)


@pytest.mark.parametrize("in_flight", [False, True])
def test_the_step_that_was_saved_last_is_saved_again_where_that_is_asked_for(in_flight: bool, path: Path) -> None:
    with Checkpointer(path, keep=KeepLast(2)) as run:
        run.save(1, state(1))
        first = run.save(2, state(2))
        if not in_flight:
            first.result()
        with pytest.raises(StepExists, match="step 2"):
            run.save(2, state(3))
        run.save(2, state(102), again=True)
        again = run.save(2, state(202), again=True).result()
        assert first.result().path == again.path
        with pytest.raises(StepExists, match="step 1"):
            run.save(1, state(101), again=True)
        run.save(3, state(103), again=True).result()  # nothing has to make way
    assert (steps(path), value(path, 2), value(path)) == ([2, 3], 202, 103)
    assert [entry.name for entry in path.iterdir() if "replaced" in entry.name] == []


def test_a_step_whose_second_save_fails_is_there_as_it_was_saved_first(path: Path) -> None:
    saved(path, 1)
    with Checkpointer(path) as run:
        run.save(2, state(2)).result()
        ops = run._store.ops = FaultyOps()
        ops.fail = ("rename_noreplace", 2, errno.EIO)  # the first makes room, the second publishes
        assert run.save(2, state(102), again=True).exception(30) is not None
        assert ops.seen >= 2, "the step before it had not made way"
        assert value(path, 2) == 2
        ops.fail = None
        run.save(2, state(202), again=True).result()
    assert (steps(path), value(path)) == ([1, 2], 202)


def test_a_first_save_that_fails_does_not_keep_the_second_from_its_step(path: Path) -> None:
    saved(path, 1)
    with Checkpointer(path) as run:
        run.prepare(state(0))
        ops = run._store.ops = FaultyOps()
        ops.fail = ("rename_noreplace", 1, errno.EIO)
        first = run.save(2, state(2))
        second = run.save(2, state(102), again=True)
        assert first.exception(30) is not None
        second.result()
    assert (steps(path), value(path)) == ([1, 2], 102)


# -- any of it, in any order -------------------------------------------------------------------------------------------


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.integers(1, 3)),
        st.tuples(st.just("back"), st.integers(0, 20)),
        st.tuples(st.just("reopen"), st.just(0)),
        st.tuples(st.just("fail"), st.just(0)),
    ),
    min_size=3,
    max_size=14,
)


@examples(25)
@given(moves=MOVES, k=st.integers(1, 4), old=st.booleans())
def test_what_was_acknowledged_last_is_the_newest_whatever_training_did(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, int]], k: int, old: bool
) -> None:
    path = tmp_path_factory.mktemp("any") / "run"
    saved(path, 2, 4, 6)
    if old:
        without_sequence(path)
    line = [(2, 2), (4, 4), (6, 6)]  # (step, value), the oldest save first, as retention leaves it
    at, count = 6, 100
    run = Checkpointer(path, keep=KeepLast(k))
    assert run.resume(state(0)) == 6
    for move, number in moves:
        if move == "save":
            at, count = at + number, count + 1
            run.save(at, state(count)).result()
            run.wait()
            line = [*(one for one in line if one[0] != at), (at, count)][-k:]
        elif move == "back":
            at = line[number % len(line)][0]
            live = state(0)
            run.restore(live, step=at)
            assert live["meta"]["value"] == dict(line)[at]
        elif move == "fail":
            ops = run._store.ops = FaultyOps()
            ops.fail = ("pwrite", 1, errno.EIO)
            assert run.save(at + 1, state(-7)).exception(30) is not None
            ops.fail = None
        else:
            run.close()
            run = Checkpointer(path, keep=KeepLast(k))
            at = run.resume(state(0))
        assert [(entry.step, value(path, entry.step)) for entry in run.ls()] == line
        assert value(path) == line[-1][1]
    run.close()
