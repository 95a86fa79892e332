"""Checks that planted bugs in what finds, reads and annotates checkpoints have to be caught by: each a plain function
of an empty directory, as in ``mutant_checks``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from support.branches import saved, state, steps, value

from asyncckpt import Checkpointer, InvalidOption, KeepBest, KeepLast, NewestDamaged, Run
from asyncckpt.storage.local import LocalStore

BEST = (KeepBest("val_loss"), KeepLast(1))


def _refuses(run: Run) -> bool:
    try:
        run.load_tensors()
    except NewestDamaged:
        return bool(run.verify())
    return False


def a_damaged_newest_is_refused(path: Path) -> None:
    saved(path / "run", 1, 2)
    os.truncate(path / "run" / "step-00000002" / "state.json", 1)
    assert _refuses(Run(path / "run"))


def an_emptied_newest_is_refused(path: Path) -> None:
    saved(path / "run", 1, 2)
    shutil.rmtree(path / "run" / "step-00000002")
    (path / "run" / "step-00000002").mkdir()
    assert _refuses(Run(path / "run"))


def what_was_saved_after_going_back_is_the_newest_though_unreadable(path: Path) -> None:
    saved(path / "run", 1, 3)
    with Checkpointer(path / "run") as run:
        run.restore(state(0), step=1)
        run.save(2, state(2)).result()
    os.truncate(path / "run" / "step-00000002" / "manifest.json", 10)
    assert _refuses(Run(path / "run"))


def what_others_keep_beside_is_not_the_newest(path: Path) -> None:
    saved(path / "run", 1, 2)
    (path / "run" / "checkpoint-9").mkdir()
    (path / "run" / "checkpoint-9" / "model-00001-of-00002.safetensors").write_bytes(b"theirs")
    assert steps(path / "run") == [1, 2]
    assert Run(path / "run").newest().step == 2
    assert value(path / "run") == 2


def a_missing_component_is_found(path: Path) -> None:
    saved(path / "run", 1)
    assert Run(path / "run").verify(require=("w", "meta")) == []
    found = Run(path / "run").verify(require="optimizer")
    assert [("'optimizer'" in one.problem) for one in found] == [True]


def annotations_decide_what_is_kept(path: Path) -> None:
    saved(path / "run", 1, 2, 3)
    Run(path / "run").annotate(1, {"val_loss": 0.2})
    Run(path / "run").annotate(1, {"accuracy": 0.5})
    with Checkpointer(path / "run", keep=BEST) as run:
        run.save(4, state(4)).result()
    assert steps(path / "run") == [1, 4]
    assert dict(Run(path / "run").ls()[0].annotated) == {"val_loss": 0.2, "accuracy": 0.5}


def an_annotation_belongs_to_one_save(path: Path) -> None:
    saved(path / "run", 1, 2)
    Run(path / "run").annotate(2, {"val_loss": 0.2})
    with Checkpointer(path / "run") as run:
        run.restore(state(0), step=1)
        run.save(2, state(20)).result()
    assert [dict(entry.metrics) for entry in Run(path / "run").ls()] == [{}, {}]


def an_annotation_that_cannot_be_read_lets_nothing_be_deleted(path: Path) -> None:
    saved(path / "run", 1, 2, 3)
    for step in (1, 2):
        Run(path / "run").annotate(step, {"val_loss": float(step)})
    for note in (path / "run" / ".annotations").iterdir():
        if b"1.0" in note.read_bytes():
            note.write_bytes(note.read_bytes().replace(b"1.0", b"9.0"))
    with Checkpointer(path / "run", keep=BEST) as run:
        run.prune()
    assert steps(path / "run") == [1, 2, 3]


def what_is_annotated_while_others_are_deleted_stays(path: Path) -> None:
    saved(path / "run", 1, 2, 3, 4)
    Run(path / "run").annotate(2, {"val_loss": 0.9})
    remove = LocalStore.remove

    def annotating(self: LocalStore, name: str) -> bool:
        LocalStore.remove = remove  # type: ignore[method-assign]
        removed = remove(self, name)
        Run(path / "run").annotate(3, {"val_loss": 0.1})
        return removed

    LocalStore.remove = annotating  # type: ignore[method-assign]
    try:
        with Checkpointer(path / "run", keep=BEST) as run:
            run.prune()
    finally:
        LocalStore.remove = remove  # type: ignore[method-assign]
    assert 3 in steps(path / "run")


def an_annotation_goes_with_its_checkpoint(path: Path) -> None:
    saved(path / "run", 1, 2)
    Run(path / "run").annotate(1, {"val_loss": 0.2})
    with Checkpointer(path / "run", keep=KeepLast(1)) as run:
        run.prune()
    assert os.listdir(path / "run" / ".annotations") == []


def a_name_that_nobody_can_type_is_refused(path: Path) -> None:
    saved(path / "run", 1)
    try:
        Run(path / "run").annotate(1, {"val\nloss": 1.0})
    except InvalidOption:
        return
    raise AssertionError("it was taken")
