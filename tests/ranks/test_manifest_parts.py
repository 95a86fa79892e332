"""A manifest in parts: each rank lists what it wrote, and whoever reads finds the same as in one manifest."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.harness import Crews, Me
from support.options import by_stage
from support.parallelisms import SIZES, TIMEOUT
from support.sharded_states import build
from typer.testing import CliRunner

import asyncckpt
from asyncckpt import CheckpointDamaged, SaveFailed
from asyncckpt.cli.app import app
from asyncckpt.manifest.parts import part_name
from asyncckpt.manifest.records import Manifest
from asyncckpt.storage.posix import PosixOps
from ranks.test_elastic import _restore, _seed

PARTS = replace(TIMEOUT, manifest_rows=0)
CASES = [
    (2, "ddp", 3, "fsdp2"),
    (4, "fsdp2", 2, "tp"),
    (4, "hsdp", 3, "ddp"),
    (3, "pp", 4, "fsdp2+tp"),
    (2, "ep", 3, "ep"),
    (3, "shards", 2, "shards"),
]


def _save(me: Me, path: str, way: str, steps: tuple[int, ...] = (7,), seed: int = 0) -> list[int]:
    """Return how many bytes each save wrote on this rank."""
    state = build(way, me.rank, me.size)
    _seed(me.rank + seed)
    options = by_stage(ranks=PARTS, per_rank=True, keep=(), **SIZES)
    with asyncckpt.Checkpointer(path, **options) as run:
        return [run.save(step, state).result(60).written_bytes for step in steps]


def _saved(crews: Crews, tmp_path: Path, ranks: int = 3, way: str = "fsdp2") -> Path:
    crews(ranks).values(_save, str(tmp_path / "run"), way)
    return tmp_path / "run" / "step-00000007"


def _expected() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = build("ddp", 0, 1)["model"].state_dict()
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-to-{case[2]}-{case[3]}")
def test_what_was_listed_in_parts_is_restored_anywhere(
    case: tuple[int, str, int, str], crews: Crews, tmp_path: Path
) -> None:
    before, way, after, other = case
    step = _saved(crews, tmp_path, before, way)
    assert {file.name for file in step.glob("part-*.json")} == {part_name(rank) for rank in range(before)}
    root = json.loads((step / "manifest.json").read_bytes())
    assert root["format_version"] == 5
    assert not any(row["name"].endswith(".safetensors") for row in root["files"]), "the root lists files of ranks"
    wrong = crews(after).values(_restore, str(tmp_path / "run"), other, dict(SIZES), before)
    assert not any(wrong), wrong
    assert asyncckpt.Run(tmp_path / "run").verify() == []


def test_a_small_job_has_one_manifest(crews: Crews, tmp_path: Path) -> None:
    crews(2).values(_save_small, str(tmp_path / "run"))
    (step,) = (tmp_path / "run").glob("step-*")
    assert not list(step.glob("part-*"))
    assert json.loads((step / "manifest.json").read_bytes())["format_version"] <= 4


def _save_small(me: Me, path: str) -> None:
    with asyncckpt.Checkpointer(path, **by_stage(ranks=TIMEOUT, per_rank=True, **SIZES)) as run:
        run.save(1, build("fsdp2", me.rank, me.size)).result(60)


# -- which parts are read --------------------------------------------------------------------------------------------


class _Counting(PosixOps):
    """Remembers the names of the parts that were opened."""

    def __init__(self) -> None:
        self.opened: set[str] = set()

    def open_to_read(self, path: str, flags: int, folder: int | None = None) -> int:
        if path.startswith("part-"):
            self.opened.add(path)
        return super().open_to_read(path, flags, folder)


def _parts_read(me: Me, path: str) -> dict[str, set[str]]:
    """Return the parts that were read by each call."""
    found: dict[str, set[str]] = {}
    with asyncckpt.Checkpointer(path, **by_stage(ranks=PARTS, per_rank=True, **SIZES)) as run:
        ops = run._store.ops = _Counting()
        run.ls()
        found["ls"] = set(ops.opened)
        state = build("fsdp2", me.rank, me.size)
        run.restore({name: state[name] for name in ("model", "optimizer")})
        found["restore"] = set(ops.opened)
    return found


def test_a_rank_reads_the_parts_that_it_needs(crews: Crews, tmp_path: Path) -> None:
    _saved(crews, tmp_path, 4)
    for rank, found in enumerate(crews(4).values(_parts_read, str(tmp_path / "run"))):
        assert not found["ls"]
        # small tensors that all ranks hold, such as step counts, are the first rank's
        assert part_name(rank) in found["restore"] <= {part_name(0), part_name(rank)}


def _said(*words: str) -> str:
    """Return what a command prints. Fails the test where it fails."""
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.output


# -- what everybody does with a checkpoint -----------------------------------------------------------------------------


def test_a_process_alone_reads_it_like_any_other(crews: Crews, tmp_path: Path) -> None:
    _saved(crews, tmp_path)
    found = asyncckpt.Run(tmp_path / "run").load_tensors(None, ["model"])
    assert {name.removeprefix("model.") for name in found} == set(_expected())
    assert all(torch.equal(found[f"model.{name}"], value) for name, value in _expected().items())


def test_exported_it_is_what_it_was(crews: Crews, tmp_path: Path) -> None:
    _saved(crews, tmp_path)
    assert _said("export", str(tmp_path / "run"), "7", str(tmp_path / "out.safetensors"))
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() <= _expected().keys()
    assert all(torch.equal(found[name], _expected()[name]) for name in found)


@pytest.mark.parametrize("words", [["ls"], ["show"], ["verify"], ["diff", "7", "8"]], ids=lambda words: words[0])
def test_commands_take_it(words: list[str], crews: Crews, tmp_path: Path) -> None:
    crews(3).values(_save, str(tmp_path / "run"), "fsdp2", (7, 8))
    command, *steps = words
    assert _said(command, str(tmp_path / "run"), *steps)


def test_a_copy_is_the_same(crews: Crews, tmp_path: Path) -> None:
    step = _saved(crews, tmp_path)
    assert _said("copy", str(tmp_path / "run"), str(tmp_path / "copy"), "7")
    assert (tmp_path / "copy" / step.name / "manifest.json").read_bytes() == (step / "manifest.json").read_bytes()
    assert asyncckpt.Run(tmp_path / "copy").verify() == []


def test_what_is_thinned_has_one_manifest(crews: Crews, tmp_path: Path) -> None:
    crews(3).values(_save, str(tmp_path / "run"), "fsdp2", (7, 8))
    assert _said("thin", str(tmp_path / "run"), "--optimizer", "--older-than", "8")
    run = asyncckpt.Run(tmp_path / "run")
    (row,) = [row for row in run.ls() if row.step == 7]
    assert row.kind == "weights"
    assert not list(Path(row.path).glob("part-*"))
    assert run.verify(7) == []
    found = run.load_tensors(7)
    assert all(torch.equal(found[f"model.{name}"], value) for name, value in _expected().items())


def test_what_has_not_changed_is_linked_by_this_process_and_the_next(crews: Crews, tmp_path: Path) -> None:
    for first, second in crews(2).values(_save, str(tmp_path / "run"), "fsdp2", (7, 8)):
        assert second < first // 10, (first, second)
    for (third,) in crews(2).values(_save, str(tmp_path / "run"), "fsdp2", (9,)):
        assert third < first // 10, (first, third)
    assert asyncckpt.Run(tmp_path / "run").verify(9) == []


# -- damage ------------------------------------------------------------------------------------------------------------


def _flip(part: Path, other: Path) -> None:
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)


def _cut(part: Path, other: Path) -> None:
    part.write_bytes(part.read_bytes()[:-1])


def _take_others(part: Path, other: Path) -> None:
    shutil.copy(other / part.name, part)


DAMAGE: dict[str, Callable[[Path, Path], None]] = {
    "lost": lambda part, _other: part.unlink(),
    "a bit flipped": _flip,
    "cut": _cut,
    "that of another step": _take_others,
    "that of another rank": lambda part, _other: shutil.copy(part.with_name(part_name(0)), part) and None,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_part_that_is_not_what_was_written_is_damage(how: str, crews: Crews, tmp_path: Path) -> None:
    crews(3).values(_save, str(tmp_path / "run"), "fsdp2", (6, 7))
    step = tmp_path / "run" / "step-00000007"
    DAMAGE[how](step / part_name(1), step.with_name("step-00000006"))
    run = asyncckpt.Run(tmp_path / "run")
    assert part_name(1) in {one.file for one in run.verify(7)}
    assert run.verify(6) == []
    state = build("ddp", 0, 1)
    with pytest.raises(CheckpointDamaged, match=part_name(1)):
        run.restore({"model": state["model"]}, 7)
    with pytest.warns(RuntimeWarning, match="cannot be used"):
        assert run.restore({"model": state["model"]}).step == 6
    assert all(torch.equal(state["model"].state_dict()[name], value) for name, value in _expected().items())


def test_any_bit_of_any_file_is_found(crews: Crews, tmp_path: Path) -> None:
    step, rng = _saved(crews, tmp_path, 2), random.Random(1)
    run = asyncckpt.Run(tmp_path / "run")
    for file in sorted(step.iterdir()):
        data = file.read_bytes()
        for at in (0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(3))):
            file.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
            assert run.verify(7), f"byte {at} of {file.name}"
        file.write_bytes(data)
    assert run.verify(7) == []


def _save_with_a_gap(me: Me, path: str) -> str:
    """Rank 1 lists one box less than it has written, and all digests are right."""
    from asyncckpt.ranks import part_reports

    listed = part_reports.boxes_of

    def gap(*args: Any) -> Any:
        found = {name: dict(tensors) for name, tensors in listed(*args).items()}
        if me.rank == 1:
            del found["model"][next(iter(found["model"]))]
        return found

    part_reports.boxes_of = gap
    try:
        _save(me, path, "fsdp2")
    except SaveFailed as error:
        return str(error)
    finally:
        part_reports.boxes_of = listed
    return ""


def test_rows_that_no_part_lists_are_damage(crews: Crews, tmp_path: Path) -> None:
    crews(2).values(_save_with_a_gap, str(tmp_path / "run"))
    run = asyncckpt.Run(tmp_path / "run")
    assert run.verify(7), "a tensor lacks rows"
    with pytest.raises(CheckpointDamaged, match="each once"):
        run.restore({"model": build("ddp", 0, 1)["model"]}, 7)


def test_the_root_alone_says_what_is_there(crews: Crews, tmp_path: Path) -> None:
    _saved(crews, tmp_path)
    found = asyncckpt.Run(tmp_path / "run")._read(7, lambda checkpoint: _facts(checkpoint.manifest))
    assert found["nbytes"] == sum(file.stat().st_size for file in (tmp_path / "run" / "step-00000007").iterdir())
    assert found["shapes"] == {name: tuple(value.shape) for name, value in _expected().items()}


def _facts(manifest: Manifest) -> dict[str, Any]:
    shapes = {name: tensor.shape for name, tensor in manifest.components["model"].tensors.items()}
    return {"nbytes": manifest.nbytes, "shapes": shapes}
