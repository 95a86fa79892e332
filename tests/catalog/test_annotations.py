"""Metrics that are found after a checkpoint was saved lie beside it, durably, and count for what is kept."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.branches import saved, state, steps

from asyncckpt import (
    CheckpointDamaged,
    Checkpointer,
    CheckpointNotFound,
    InvalidOption,
    KeepBest,
    KeepLast,
    Run,
    RunOptions,
    RunPathError,
    repeated_lines,
)
from asyncckpt.catalog import annotations
from asyncckpt.protocols import Store
from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.memory import MemoryBucket, MemoryStore

BEST = (KeepBest("val_loss", n=1), KeepLast(1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(params=["a directory", "a bucket"])
def store(request: pytest.FixtureRequest, path: Path) -> Callable[[], Store]:
    """Makes the store of one run, as another process would."""
    bucket = MemoryBucket(f"memory://{path}")
    return lambda: LocalStore(str(path)) if request.param == "a directory" else MemoryStore(bucket)


@pytest.fixture(autouse=True)
def _every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the log hold back no line that another test has logged, too."""
    monkeypatch.setattr(repeated_lines, "WINDOW_SECONDS", 0.0)


def _metrics(run: Run) -> dict[int, dict[str, float]]:
    return {entry.step: dict(entry.metrics) for entry in run.ls()}


def _notes(path: Path) -> list[str]:
    folder = path / ".annotations"
    return sorted(os.listdir(folder)) if folder.exists() else []


def _digests(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(path.glob("step-*/**/*")) if file.is_file()}


def test_the_writer_keeps_what_was_found_to_be_the_best_later(store: Callable[[], Store]) -> None:
    with Checkpointer("memory://x", keep=BEST, run=RunOptions(store=store())) as run:
        for step in (1, 2, 3, 4):
            run.save(step, state(step)).result()
        run.wait()
        evaluator = Run("memory://x", store=store())
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.7)):
            row = evaluator.annotate(step, {"val_loss": loss})
            assert (row.step, dict(row.annotated)) == (step, {"val_loss": loss})
        assert _metrics(evaluator) == {1: {"val_loss": 0.5}, 2: {"val_loss": 0.1}, 3: {"val_loss": 0.7}, 4: {}}
        run.save(5, state(5)).result()
        run.close()
    assert _metrics(Run("memory://x", store=store())) == {2: {"val_loss": 0.1}, 5: {}}
    assert list(store().listing(".annotations")) == list(
        annotations.Annotations(store()).keys().values()
    )  # those of the deleted ones went with them
    assert len(store().listing(".annotations")) == 1


def test_a_checkpoints_files_stay_what_they_are(path: Path) -> None:
    with Checkpointer(path) as run:
        report = run.save(1, state(1), metrics={"loss": 2.0}).result()
    before = _digests(path)
    Run(path).annotate(1, {"val_loss": 0.3})
    assert _digests(path) == before
    assert Run(path).verify(1, expect_digest=report.manifest_digest) == []
    assert _metrics(Run(path)) == {1: {"loss": 2.0, "val_loss": 0.3}}


def test_the_later_of_two_counts_and_others_stay(path: Path) -> None:
    with Checkpointer(path) as run:
        run.save(1, state(1), metrics={"loss": 2.0}).result()
        run.annotate(1, {"loss": 1.5, "a": 1})
        run.annotate(1, {"a": 2.5, "b": math.inf})
        row = run.annotate(1, {"c": math.nan})
    assert dict(row.metrics) | {"c": 0} == {"loss": 1.5, "a": 2.5, "b": math.inf, "c": 0}
    assert math.isnan(row.metrics["c"])
    (read,) = Run(path).ls()
    assert repr(dict(read.metrics)) == repr(dict(row.metrics))
    assert repr(dict(read.annotated)) == repr({"loss": 1.5, "a": 2.5, "b": math.inf, "c": math.nan})


def test_a_value_that_is_nan_is_never_among_the_best(path: Path) -> None:
    saved(path, 1, 2, 3)
    Run(path).annotate(1, {"val_loss": math.nan})
    Run(path).annotate(2, {"val_loss": 5.0})
    with Checkpointer(path, keep=BEST) as run:
        run.prune()
    assert steps(path) == [2, 3]


def test_many_at_once_lose_none(store: Callable[[], Store]) -> None:
    with Checkpointer("memory://x", run=RunOptions(store=store())) as run:
        run.save(1, state(1)).result()

    def annotate(number: int) -> None:
        Run("memory://x", store=store()).annotate(1, {f"metric{number}": number})

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(annotate, range(24)))
    assert _metrics(Run("memory://x", store=store())) == {1: {f"metric{n}": float(n) for n in range(24)}}


def _annotate_all(path: str, steps_to_annotate: list[int]) -> None:
    for step in steps_to_annotate:
        Run(path).annotate(step, {"val_loss": -float(step)})


def test_it_works_beside_a_writer_in_another_process(path: Path) -> None:
    with Checkpointer(path, keep=[KeepBest("val_loss", n=1), KeepLast(2)]) as run:
        run.save(1, state(1)).result()
        run.save(2, state(2)).result()
        other = multiprocessing.get_context("spawn").Process(target=_annotate_all, args=(str(path), [1, 2]))
        other.start()
        other.join(60)
        assert other.exitcode == 0
        for step in (3, 4, 5):
            run.save(step, state(step)).result()
    assert steps(path) == [2, 4, 5]


@pytest.mark.parametrize("how", ["overwrite", "going back"])
def test_a_step_that_is_saved_again_has_none_of_them(path: Path, how: str) -> None:
    saved(path, 1, 2)
    Run(path).annotate(2, {"val_loss": 0.1})
    with Checkpointer(path, keep=KeepLast(5), run=RunOptions(overwrite=how == "overwrite")) as run:
        if how == "overwrite":
            run.resume(state(0))
        else:
            run.restore(state(0), step=1)
        run.save(2, state(20)).result()
        run.wait()
        run.close()
    assert _metrics(Run(path)) == {1: {}, 2: {}}


def test_what_nobody_can_have_any_more_is_cleared(path: Path) -> None:
    saved(path, 1, 2)
    Run(path).annotate(2, {"val_loss": 0.1})
    with Checkpointer(path, keep=KeepLast(5), run=RunOptions(overwrite=True)) as run:
        run.resume(state(0))
        run.save(2, state(20)).result()
        run.prune()
    assert _notes(path) == []


@pytest.mark.parametrize("remains", ["an unreadable one", "one that was set aside"])
def test_what_somebody_may_still_want_is_not_cleared(path: Path, remains: str) -> None:
    saved(path, 1, 2, 3)
    Run(path).annotate(2, {"val_loss": 0.1})
    if remains == "an unreadable one":
        os.truncate(path / "step-00000002" / "manifest.json", 10)
    else:
        (path / "step-00000002").rename(path / ".damaged-step-00000002-0123abcd")
    with Checkpointer(path, keep=KeepLast(1)) as run:
        run.prune()
    assert len(_notes(path)) == 1


def test_a_copy_keeps_the_metrics_of_what_was_deleted(path: Path) -> None:
    saved(path, 1, 2)
    Run(path).annotate(1, {"val_loss": 0.1})
    shutil.copytree(path / "step-00000001", path / "for-the-paper")
    with Checkpointer(path, keep=KeepLast(1)) as run:
        run.prune()
    assert {entry.name: dict(entry.annotated) for entry in Run(path).ls()} == {
        "for-the-paper": {"val_loss": 0.1},
        "step-00000002": {},
    }


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({}, "names and numbers"),
        (0.3, "names and numbers"),
        ({"": 1.0}, "printable text"),
        ({"a\nb": 1.0}, "printable text"),
        ({" loss": 1.0}, "printable text"),
        ({3: 1.0}, "printable text"),
        ({"a" * 201: 1.0}, "printable text"),
        ({"loss": "low"}, "no number"),
        ({"loss": None}, "no number"),
    ],
)
def test_what_is_no_metric_is_refused(path: Path, metrics: Any, told: str) -> None:
    saved(path, 1)
    with pytest.raises(InvalidOption, match=told):
        Run(path).annotate(1, metrics)
    assert _notes(path) == []


def test_a_checkpoint_that_is_not_there_or_cannot_be_used_takes_none(path: Path) -> None:
    saved(path, 1, 2)
    with pytest.raises(CheckpointNotFound, match="no checkpoint of step 7; the newest steps there: 1, 2"):
        Run(path).annotate(7, {"val_loss": 1.0})
    os.truncate(path / "step-00000002" / "state.json", 1)
    with pytest.raises(CheckpointDamaged, match=r"step-00000002.*takes no metrics"):
        Run(path).annotate(2, {"val_loss": 1.0})
    assert _notes(path) == []


def test_a_folder_that_leads_elsewhere_is_refused(path: Path) -> None:
    saved(path, 1)
    (path.parent / "elsewhere").mkdir()
    (path / ".annotations").symlink_to(path.parent / "elsewhere")
    with pytest.raises((RunPathError, CheckpointDamaged)):
        Run(path).annotate(1, {"val_loss": 1.0})
    assert os.listdir(path.parent / "elsewhere") == []


def test_one_that_was_deleted_meanwhile_is_not_said_to_be_annotated(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(path, 1, 2)
    add = annotations.Annotations.add

    def slow(self: annotations.Annotations, attempt: str, metrics: Any) -> Any:
        found = add(self, attempt, metrics)
        shutil.rmtree(path / "step-00000001")
        return found

    monkeypatch.setattr(annotations.Annotations, "add", slow)
    with pytest.raises(CheckpointNotFound, match="not annotated"):
        Run(path).annotate(1, {"val_loss": 1.0})
    assert _notes(path) == []


# -- what cannot be read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["a digit", "cut", "empty", "of another checkpoint", "no object"])
def test_annotations_that_cannot_be_read_are_told_and_nothing_is_deleted_for_them(
    path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(path, 1, 2, 3, 4)
    for step in (1, 2):
        Run(path).annotate(step, {"val_loss": 0.25 * step})
    first = {entry.step: entry.attempt for entry in Run(path).ls()}
    note = path / ".annotations" / f"{first[1]}.000001"
    data = note.read_bytes()
    note.write_bytes(
        {
            "a digit": data.replace(b"0.25", b"9.25"),
            "cut": data[:-5],
            "empty": b"",
            "of another checkpoint": (path / ".annotations" / f"{first[2]}.000001").read_bytes(),
            "no object": b"[1]\n",
        }[damage]
    )
    row = Run(path).ls()[0]
    assert row.annotation_problem is not None
    assert str(note) in row.annotation_problem
    assert row.metrics == {}
    with Checkpointer(path, keep=BEST) as run:
        run.prune()
    assert steps(path) == [1, 2, 4]  # nobody knows how good 1 is
    assert "cannot be read" in caplog.text
    with pytest.raises(CheckpointDamaged, match="Remove that file"):
        Run(path).annotate(1, {"val_loss": 1.0})
    note.unlink()
    assert Run(path).annotate(1, {"val_loss": 1.0}).metrics == {"val_loss": 1.0}


def test_files_of_others_in_the_folder_are_left_alone(path: Path) -> None:
    saved(path, 1, 2)
    Run(path).annotate(1, {"val_loss": 1.0})
    (path / ".annotations" / "notes.txt").write_text("mine")
    with Checkpointer(path, keep=KeepLast(1)) as run:
        run.prune()
    assert _notes(path) == ["notes.txt"]


# -- a view that is old ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["annotated", "pinned"])
def test_what_is_marked_while_others_are_deleted_stays(path: Path, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan was made before, and it is looked again before each deletion."""
    saved(path, 1, 2, 3, 4)
    Run(path).annotate(1, {"val_loss": 0.9})
    Run(path).annotate(2, {"val_loss": 0.8})
    remove, done = LocalStore.remove, list[str]()

    def slow(self: LocalStore, name: str) -> bool:
        removed = remove(self, name)
        if not done:
            if mark == "annotated":
                Run(path).annotate(3, {"val_loss": 0.1})
            else:
                Run(path).pin(3)
        done.append(name)
        return removed

    monkeypatch.setattr(LocalStore, "remove", slow)
    with Checkpointer(path, keep=BEST) as run:
        run.prune()
    assert 3 in steps(path)
    assert done[0] == "step-00000001"
