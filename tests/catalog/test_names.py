"""Names: a step may have several checkpoints, and a name means the one that was saved last of those that have it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples
from typer.testing import CliRunner

from asyncckpt import (
    CheckpointDamaged,
    Checkpointer,
    CheckpointNotFound,
    InvalidOption,
    InvalidStep,
    KeepEvery,
    KeepLast,
    Run,
    RunOptions,
    SaveFailed,
    StepExists,
)
from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.catalog.retention import plan
from asyncckpt.cli.app import app
from asyncckpt.manifest import json as manifests


def state(value: int = 0) -> dict[str, Any]:
    return {"w": torch.arange(5000) + 0.5, "value": value}


def value(run: Run, which: int | str | None) -> int:
    found = state(-1)
    run.restore(found, which)
    return int(found["value"])


def listed(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    return [(entry.name, entry.names) for entry in Run(path).ls()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_one_step_has_several_and_what_did_not_change_is_linked(path: Path) -> None:
    with Checkpointer(path) as run:
        run.save(100, state(1), name="epoch=1-step=100").result()
        second = run.save(100, state(2), name="last").result()
        assert second.written_bytes < 3000 < second.nbytes
        assert listed(path) == [("step-00000100", ("epoch=1-step=100",)), ("step-00000100+2", ("last",))]
        assert [value(run, which) for which in ("epoch=1-step=100", "last", 100, None, "step-00000100")] == [
            1,
            2,
            2,
            2,
            1,
        ]
        first, other = (path / name / "w-00001-of-00001.safetensors" for name in ("step-00000100", "step-00000100+2"))
        assert first.read_bytes() == other.read_bytes()
    assert [Run(path).verify(which) for which in ("epoch=1-step=100", "last")] == [[], []]
    with Checkpointer(path) as run:
        assert run.resume(state()) == 100


def test_a_name_moves_and_what_it_meant_stays_what_it_was(path: Path) -> None:
    with Checkpointer(path) as run:
        for step in (1, 2, 3):
            before = {file: file.stat().st_mtime_ns for file in path.rglob("*.json") if file.parent.name[0] == "s"}
            run.save(step, state(step), name=["last", f"step {step}"]).result()
            assert value(run, "last") == step
            assert {file: file.stat().st_mtime_ns for file in before} == before, "something was rewritten"
        run.save(3, state(33), name="last").result()
        run.save(3, state(34), name="last").result()
        assert value(run, "last") == 34
        assert [value(run, f"step {step}") for step in (1, 2, 3)] == [1, 2, 3]
    assert Run(path).ls()[-1].name == "step-00000003+3"


def test_a_name_moves_only_with_a_checkpoint_that_is_published(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpointer(path) as run:
        run.save(1, state(1), name="last").result()
        with monkeypatch.context() as patch:
            patch.setattr(run._store.ops, "rename_noreplace", _refuse)  # type: ignore[attr-defined]
            with pytest.raises(SaveFailed):
                run.save(2, state(2), name="last").result()
        assert value(run, "last") == 1
        run.save(2, state(22), name="last").result()
        assert value(run, "last") == 22


def _refuse(*_: object) -> None:
    raise OSError(5, os.strerror(5))


def test_a_name_whose_checkpoint_is_damaged_is_no_older_one(path: Path) -> None:
    with Checkpointer(path) as run:
        run.save(1, state(1), name="last").result()
        run.save(2, state(2), name="last").result()
    (path / "step-00000002" / "state.json").unlink()
    with pytest.raises(CheckpointDamaged, match="step-00000002"):
        Run(path).restore(state(), "last")
    assert Run(path).verify("last") != []


def test_copies_have_no_name(path: Path) -> None:
    with Checkpointer(path) as run:
        run.save(1, state(1), name="last").result()
        run.save(2, state(2), name="last").result()
    (path / "step-00000002").rename(path / "mine")
    assert value(Run(path), "last") == 1


def test_an_unknown_name_says_which_there_are(path: Path) -> None:
    with Checkpointer(path) as run:
        run.save(1, state(), name="best").result()
        for call in (run.restore, run.load_tensors, run.verify, run.open, run.assets, run.pin, run.unpin):
            arguments: tuple[Any, ...] = (state(), "last") if call == run.restore else ("last",)
            with pytest.raises(CheckpointNotFound, match="'last'; the names there: best"):
                call(*arguments)


def test_a_step_without_a_name_is_saved_once(path: Path) -> None:
    with Checkpointer(path) as run:
        run.save(5, state(), name="a1").result()
        with pytest.raises(StepExists, match="name="):
            run.save(5, state())
        run.save(5, state(), weights_only=False, name="a2").result()
        with pytest.raises(InvalidStep):
            run.save(4, state(), name="last")
    with Checkpointer(path) as run:  # and another process knows
        with pytest.raises(StepExists):
            run.save(5, state())
        assert run.save(5, state(), name="a3").result().path.endswith("step-00000005+3")


@pytest.mark.parametrize(
    "bad", ["latest", "Latest", "a/b", " a", "a ", "", "a\nb", "\x1b", "x" * 201, 3, b"x", ["a", ""], [1]]
)
def test_what_is_no_name_is_refused(bad: Any, path: Path) -> None:
    with Checkpointer(path) as run:
        with pytest.raises(InvalidOption, match="name="):
            run.save(1, state(), name=bad)
        run.save(1, state()).result()


def test_pins_and_the_command_know_names(path: Path) -> None:
    with Checkpointer(path) as run:
        run.save(7, state(1), name="epoch=1").result()
        run.save(7, state(2), name="last").result()
        assert run.pin("epoch=1").name == "step-00000007"
        assert [entry.pinned for entry in run.ls()] == [True, False]
        run.unpin("epoch=1")
    printed = ""
    for verb, name in (("pin", "last"), ("show", "epoch=1"), ("ls", ""), ("verify", "last")):
        result = CliRunner().invoke(app, [verb, str(path), *([name] if name else [])])
        assert result.exit_code == 0, result.output
        printed += result.output
    assert "names: epoch=1" in printed
    assert "named last" in printed
    assert [entry.pinned for entry in Run(path).ls()] == [False, True]


# -- with other ways to save -------------------------------------------------------------------------------------------


def test_an_overwriting_run_replaces_the_checkpoint_of_that_name(path: Path) -> None:
    with Checkpointer(path, run=RunOptions(overwrite=True)) as run:
        run.save(1, state(1), name="a").result()
        run.save(1, state(2), name="b").result()
        run.save(1, state(3), name="a").result()
        run.wait()
        assert listed(path) == [("step-00000001+2", ("b",)), ("step-00000001", ("a",))]
        assert [value(run, name) for name in ("a", "b")] == [3, 2]


def test_going_back_replaces_all_checkpoints_of_a_step_that_is_saved_again(path: Path) -> None:
    with Checkpointer(path) as run:
        run.save(1, state(1), name="epoch=1").result()
        for name in ("epoch=2", "last"):
            run.save(2, state(2), name=name).result()
        run.restore(state(), 1)
        run.save(2, state(20), name="epoch=2").result()
        run.wait()
        assert listed(path) == [("step-00000001", ("epoch=1",)), ("step-00000002", ("epoch=2",))]
        run.save(2, state(21), name="last").result()
        assert [value(run, name) for name in ("epoch=1", "epoch=2", "last")] == [1, 20, 21]


def test_a_failed_save_leaves_the_checkpoints_of_its_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpointer(path) as run:
        run.save(1, state(1)).result()
        for name in ("epoch=2", "last"):
            run.save(2, state(2), name=name).result()
        run.restore(state(), 1)
        with monkeypatch.context() as patch:
            patch.setattr(run._store.ops, "exchange", _refuse)  # type: ignore[attr-defined]
            real = run._store.ops.rename_noreplace  # type: ignore[attr-defined]
            patch.setattr(
                run._store.ops,  # type: ignore[attr-defined]
                "rename_noreplace",
                lambda source, target: _refuse() if ".tmp-" in source else real(source, target),
            )
            with pytest.raises(SaveFailed):
                run.save(2, state(20), name="last").result()
        run.wait()
        assert [value(run, name) for name in ("epoch=2", "last")] == [2, 2]
        run.save(2, state(22), name="last").result()
        assert value(run, "last") == 22


def test_two_of_one_step_may_be_in_flight_at_once(path: Path) -> None:
    with Checkpointer(path) as run:
        pending = [run.save(1, state(n), name=f"n{n}") for n in range(4)]
        assert [Path(one.result().path).name for one in pending] == [
            "step-00000001",
            "step-00000001+2",
            "step-00000001+3",
            "step-00000001+4",
        ]


# -- retention ---------------------------------------------------------------------------------------------------------


def test_a_trainer_that_names_every_checkpoint_keeps_what_its_policy_says(path: Path) -> None:
    with Checkpointer(path, keep=KeepLast(2)) as run:
        for step in range(1, 6):
            run.save(step, state(step), name=f"epoch={step}").result()
            run.save(step, state(step), name="last").result()
            if step == 2:
                run.save(step, state(step), name="best").result()
        run.wait()
        assert {(entry.step, entry.names) for entry in run.ls()} == {
            (2, ("best",)),
            *((step, (f"epoch={step}",)) for step in (4, 5)),
            *((step, ("last",)) for step in (4, 5)),
        }
        assert [value(run, name) for name in ("best", "last")] == [2, 5]


@examples(200)
@given(
    st.lists(st.lists(st.sampled_from(["last", "best", "n1", "n2"]), max_size=2, unique=True), min_size=1, max_size=12),
    st.sampled_from([(KeepLast(1),), (KeepLast(2), KeepEvery(3)), (KeepEvery(4),)]),
)
def test_no_name_comes_to_mean_an_older_checkpoint_by_retention(names: list[list[str]], policies: Any) -> None:
    entries = [
        CheckpointInfo(step=n // 2, name=str(n), path="", sequence=n, attempt=str(n), names=tuple(given))
        for n, given in enumerate(names, 1)
    ]
    deleted = plan(entries, policies)
    left = [entry for entry in entries if entry not in deleted]

    def means(name: str, among: list[CheckpointInfo]) -> CheckpointInfo | None:
        return next((entry for entry in reversed(among) if name in entry.names), None)

    for name in ("last", "best", "n1", "n2"):
        before, after = means(name, entries), means(name, left)
        assert after == before or (after is None and name in ("n1", "n2")), name
    only_digits = [entry for entry in deleted if entry.names]
    assert len(left) <= len({e.step for e in left}) * 2 + 4 or not only_digits


# -- templates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "metrics", "expected"),
    [
        ("epoch={epoch}-step={step}", {"epoch": 3}, "epoch=3-step=12"),
        ("epoch={epoch:03d}-step={step}", {"epoch": torch.tensor(3)}, "epoch=003-step=12"),
        ("e{epoch:.1f}_{step}", {"epoch": 2.5}, "e2.5_12"),
        ("{step}-{epoch}-{loss:.2f}", {"epoch": 1, "loss": 2}, "12-1-2.00"),
    ],
)
def test_a_template_takes_the_epoch(template: str, metrics: dict[str, Any], expected: str, path: Path) -> None:
    with Checkpointer(path, run=RunOptions(name=template)) as run:
        assert Path(run.save(12, state(), metrics=metrics).result().path).name == expected
        assert Path(run.save(12, state(), metrics=metrics, name="x").result().path).name == f"{expected}+2"
    assert [(entry.step, entry.damage) for entry in Run(path).ls()] == [(12, None)] * 2


def test_a_manifest_with_malformed_names_or_assets_is_refused(path: Path) -> None:
    with Checkpointer(path, assets={"a.txt": b""}) as run:
        run.save(1, state(), name="last").result()
    data = (path / "step-00000001" / manifests.FILE_NAME).read_bytes()
    body = data[: data.rfind(b',"manifest_digest"')]
    changes: list[Callable[[bytes], bytes]] = [
        lambda text: text.replace(b'"names":["last"]', b'"names":"last"'),
        lambda text: text.replace(b'"names":["last"]', b'"names":[7]'),
        lambda text: text.replace(b'"names":["last"]', b'"names":[""]'),
        lambda text: text.replace(b'"assets":["a.txt"]', b'"assets":["b.txt"]'),
        lambda text: text.replace(b'"assets":["a.txt"]', b'"assets":["a.txt","a.txt"]'),
        lambda text: text.replace(b'"assets":["a.txt"]', b'"assets":{"a.txt":1}'),
    ]
    assert manifests.decode(manifests.seal(body), "here").names == ("last",)
    for change in changes:
        assert change(body) != body
        with pytest.raises(CheckpointDamaged):
            manifests.decode(manifests.seal(change(body)), "here")
