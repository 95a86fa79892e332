"""On its way back a checkpoint is opened, parsed and checked once, and it is held from when it is found until it is
read."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from asyncckpt import CheckpointDamaged, Checkpointer, KeepLast, Run, Zarr
from asyncckpt.catalog import catalog
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.listing import Listing, newest_of, of_step
from asyncckpt.cli.app import app
from asyncckpt.convert.single_file import export
from asyncckpt.integrations.dcp import Reader as DcpReader
from asyncckpt.manifest import json as manifests
from asyncckpt.read import opening
from asyncckpt.storage import posix
from asyncckpt.testing import InterceptedOps

STEPS = (1, 2, 3)


class _Counting(InterceptedOps):
    """Counts how often each file is opened, by its name, and each directory is listed."""

    def __init__(self) -> None:
        self.opened: Counter[str] = Counter()
        self.listed = 0

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if name == "open_to_read":
            self.opened[Path(args[0]).name] += 1
        self.listed += name == "names"
        return args


def _state() -> dict[str, Any]:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "plain": {"epoch": 0}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path / "run") as run:
        for step in STEPS:
            run.save(step, _state()).result()
    return tmp_path / "run"


def _count(run: Run, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> tuple[_Counting, Counter[str]]:
    """What ``use`` opens, and how often it parses the manifest and checks the files of each checkpoint."""
    ops = run._store.ops = _Counting()
    done: Counter[str] = Counter()
    parse, check, found = manifests.load, catalog.check_files, opening.check_files

    def load(reader: Any, *args: Any, **options: Any) -> Any:
        done["parse", reader.name] += 1
        return parse(reader, *args, **options)

    def checked(original: Any) -> Any:
        def call(reader: Any, manifest: Any) -> Any:
            done["check", reader.name] += 1
            return original(reader, manifest)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "load", load)
        patch.setattr(catalog, "check_files", checked(check))
        patch.setattr(opening, "check_files", checked(found))
        use()
    return ops, done


WAYS: dict[str, Callable[[Run], object]] = {
    "restore a step": lambda run: run.restore(_state(), 3),
    "load tensors": lambda run: run.load_tensors(3),
    "open": lambda run: run.open(3).close(),
}
NEWEST: dict[str, Callable[[Run], object]] = {
    "restore": lambda run: run.restore(_state()),
    "load tensors": lambda run: run.load_tensors(),
    "open": lambda run: run.open().close(),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_asked_for_is_opened_parsed_and_checked_once(
    way: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(path)
    ops, done = _count(run, lambda: WAYS[way](run), monkeypatch)
    assert ops.opened["step-00000003"] == ops.opened["manifest.json"] == ops.listed == 1
    assert ops.opened["state.json"] == (way != "open")
    assert done == {("parse", "step-00000003"): 1, ("check", "step-00000003"): 1}


@pytest.mark.parametrize("way", NEWEST)
def test_the_newest_is_opened_once_and_so_is_each_of_the_others(
    way: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(path)
    ops, done = _count(run, lambda: NEWEST[way](run), monkeypatch)
    names = [f"step-{step:08d}" for step in STEPS]
    assert [ops.opened[name] for name in names] == [1, 1, 1]
    assert ops.opened["manifest.json"] == len(STEPS)
    assert ops.opened["state.json"] == (way != "open")
    assert done == {(what, name): 1 for what in ("parse", "check") for name in names}


def test_resume_restores_from_what_it_found_when_it_took_the_directory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Checkpointer(path)
    ops, done = _count(run, lambda: run.resume(_state()), monkeypatch)
    run.close()
    assert ops.opened["manifest.json"] == len(STEPS)
    assert ops.opened["step-00000003"] == ops.opened["state.json"] == 1
    assert set(done.values()) == {1}


@pytest.mark.parametrize("files", ["safetensors", Zarr()], ids=str)
@pytest.mark.parametrize(
    "verb", [["show", "3"], ["show"], ["export", "3", "out.pt", "--all"], ["export", "latest", "o.pt"]]
)
def test_show_and_export_read_each_file_once(
    files: Any, verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(tmp_path / "run", files=files) as saver:
        saver.save(3, _state()).result()
    opened: Counter[str] = Counter()
    original = posix.PosixOps.open_to_read

    def count(self: Any, name: str, flags: int, folder: int | None = None) -> int:
        opened[Path(name).name] += 1
        return original(self, name, flags, folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(posix.PosixOps, "open_to_read", count)
    result = CliRunner().invoke(app, [verb[0], "run", *verb[1:]])
    assert result.exit_code == 0, result.output
    assert opened["manifest.json"] == opened["state.json"] == opened["step-00000003"] == 1


def test_dcp_reads_each_file_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()
    original = posix.PosixOps.open_to_read

    def count(self: Any, name: str, flags: int, folder: int | None = None) -> int:
        opened[Path(name).name] += 1
        return original(self, name, flags, folder)

    monkeypatch.setattr(posix.PosixOps, "open_to_read", count)
    reader = DcpReader(path / "step-00000003")
    reader.read_metadata()
    reader.close()
    assert opened["manifest.json"] == opened["state.json"] == 1


def test_retention_spares_what_was_found_until_it_has_been_read(path: Path) -> None:
    with Checkpointer(path, keep=KeepLast(1)) as writer:
        for prefer, step in ((newest_of("full"), 3), (of_step(1), 1)):
            with Run(path).listing(prefer) as listing:
                writer.prepare(_state())
                entry = next(one for one in listing.entries if one.step == step)
                assert not writer._store.remove(entry.name), "it is being read"
                with listing.open(entry) as checkpoint:
                    listing.close()
                    assert not writer._store.remove(entry.name), "it was handed over, and is still being read"
                    assert checkpoint.trees["plain"]
        assert writer._store.remove("step-00000001"), "nobody reads it any more"


def test_only_what_is_preferred_and_usable_stays_open(path: Path) -> None:
    shard = next((path / "step-00000003").glob("model-*"))
    shard.write_bytes(b"")
    run = Run(path)
    kept: list[str] = []
    keep = Listing.keep

    def note(listing: Listing, entry: Any, opened: Any) -> bool:
        kept.append(entry.name)
        return keep(listing, entry, opened)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Listing, "keep", note)
        with Catalog(run._store, run.path).listing(newest_of("full")) as listing:
            assert [entry.damage is None for entry in listing.entries] == [True, True, False]
            assert not run._store.remove("step-00000002")
            assert run._store.remove("step-00000001")
    assert set(kept) == {"step-00000001", "step-00000002"}
    assert run._store.remove("step-00000002")


def test_resume_lets_go_of_what_it_found(path: Path) -> None:
    with Checkpointer(path, keep=KeepLast(1)) as run:
        assert run.resume(_state()) == 3
        run.save(4, _state()).result()
        run.wait()
        assert [entry.step for entry in run.ls()] == [4]


def test_a_checkpoint_that_is_replaced_while_it_is_held_is_read_as_it_was_found(path: Path) -> None:
    run = Run(path)
    with run.listing(newest_of("full")) as listing:
        newest = listing.entries[-1]
        (path / newest.name).rename(path / ".aside")
        shutil.copytree(path / "step-00000001", path / newest.name)
        with listing.open(newest) as checkpoint:
            assert checkpoint.manifest.step == 3
            assert checkpoint.trees["plain"]


def test_a_handed_over_checkpoint_that_loses_a_file_is_damaged(path: Path, tmp_path: Path) -> None:
    checkpoint = Run(path).open(3)
    (path / "step-00000003" / "state.json").unlink()
    with checkpoint, pytest.raises(CheckpointDamaged, match=r"state\.json is missing"):
        export(checkpoint, tmp_path / "out.pt", what="all")
