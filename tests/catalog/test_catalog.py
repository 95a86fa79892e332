"""The catalog beside others that publish, delete, replace and pin in the same directory."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncckpt import Checkpointer, CheckpointNotFound, KeepLast, RunPathError
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.protocols import Reader
from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.reader import LocalReader
from asyncckpt.testing import Fault, InterceptedOps, Site, SiteFaultOps

STATE = {"w": torch.arange(10)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path / "run") as run:
        for step in (1, 2):
            run.save(step, STATE).result()
    return tmp_path / "run"


def catalog(store: LocalStore) -> Catalog:
    return Catalog(store, store.path)


def test_a_directory_in_which_names_keep_vanishing_is_listed_all_the_same(path: Path) -> None:
    class Restless(LocalStore):
        looks = 0

        def names(self) -> list[str]:
            self.looks += 1
            return [*super().names(), f"step-{100 + self.looks:08d}"]

    store = Restless(str(path))
    assert [entry.step for entry in catalog(store).entries()] == [1, 2]
    assert 1 < store.looks < 100, "either it did not look again, or it did without end"


def test_a_name_that_is_replaced_at_every_look_counts_as_it_was_last_seen(path: Path) -> None:
    """A damaged directory is looked at again while it changes, but not for ever."""

    class Replaced(LocalStore):
        looks = 0

        def identity(self, name: str) -> int | None:
            self.looks += 1
            return self.looks

    (path / "step-00000002" / "state.json").write_text("short")
    store = Replaced(str(path))
    found = catalog(store).entries()
    assert [entry.damage is None for entry in found] == [True, False]
    assert store.looks < 100


def test_a_checkpoint_deleted_while_its_manifest_is_looked_for_is_none(path: Path) -> None:
    class Deleting(LocalStore):
        def open(self, name: str) -> Reader:
            reader = super().open(name)
            if name == "step-00000002":
                shutil.rmtree(os.path.join(self.path, name))
            return reader

    assert [entry.step for entry in catalog(Deleting(str(path))).entries()] == [1]


def test_a_checkpoint_whose_manifest_goes_first_is_none(path: Path) -> None:
    class Deleting(LocalStore):
        def open(self, name: str) -> LocalReader:
            reader = super().open(name)
            if name == "step-00000002":
                os.unlink(os.path.join(self.path, name, "manifest.json"))
            return reader

    entries = catalog(Deleting(str(path))).entries()
    assert [entry.step for entry in entries if entry.damage is None] == [1]


def test_a_checkpoint_that_may_not_be_opened_is_damaged_and_a_foreign_directory_is_none(path: Path) -> None:
    class Closed(InterceptedOps):
        def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if name == "open_to_read" and args[0].endswith(("lost+found", "step-00000002")):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), args[0])
            return args

    (path / "lost+found").mkdir()
    whole, closed = catalog(LocalStore(str(path), ops=Closed())).entries()
    assert (whole.step, whole.damage) == (1, None)
    assert closed.step == 2
    assert closed.damage is not None
    assert "Permission denied" in closed.damage


def test_pins_are_set_and_taken_back_and_taking_back_twice_is_no_error(path: Path) -> None:
    found = catalog(LocalStore(str(path)))
    assert found.pin(1).pinned
    assert found.pins() == {"step-00000001"}
    assert [entry.pinned for entry in found.entries()] == [True, False]
    for _ in range(2):
        assert not found.pin(1, pinned=False).pinned
    assert found.pins() == set()


def test_pins_that_lead_elsewhere_are_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (path / ".pins").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunPathError, match="cannot change the pin"):
        catalog(LocalStore(str(path))).pin(1)
    assert os.listdir(tmp_path / "elsewhere") == []


def test_what_is_not_there_is_named_with_what_is(path: Path) -> None:
    found = catalog(LocalStore(str(path)))
    with pytest.raises(CheckpointNotFound, match="no checkpoint of step 7; the newest steps there: 1, 2"):
        found.find(7)
    with pytest.raises(CheckpointNotFound, match="no checkpoint here"):
        found.newest("weights")
    (path / "step-00000001" / "manifest.json").write_text("{}")
    assert found.find(1).damage is not None, "a damaged one is found, and says so"


def test_one_error_of_reading_does_not_keep_a_checkpoint_for_ever(tmp_path: Path) -> None:
    """The disk filled with what retention had once failed to look at."""
    with Checkpointer(tmp_path / "run", keep=KeepLast(1)) as run:
        ops = run._store.ops = SiteFaultOps(str(tmp_path / "run"))
        for step in (1, 2, 3):
            # at step 2: what retention looks at is what was just published
            ops.arm(*[Fault(Site("open_to_read", ".", 1), "before", errno.EIO, True)] if step == 2 else [])
            run.save(step, STATE).result()
            run.wait()
            assert bool(ops.hits) == (step == 2)
        assert [entry.step for entry in run.ls()] == [3]
