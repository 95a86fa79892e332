"""Manifests in parts that somebody made to do harm, all their digests right: a typed error or damage, never another."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncckpt import AsyncCkptError, VersionUnsupported
from asyncckpt.codecs import digests
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.parts import part_name
from asyncckpt.read.opening import open_checkpoint
from asyncckpt.read.verify import verify
from asyncckpt.restore.restore import load_tensors
from asyncckpt.storage.local import LocalStore
from faults.fuzz.fuzz_checkpoints import MemoryReader, unsealed

GOLDEN = next((Path(__file__).parent.parent / "golden").glob("v5-parts-*/step-00000002"))
#: What a forger writes where something else is expected.
VALUES: list[Any] = [
    *(None, True, 0, 1, -1, 3, 1 << 40, 1 << 62, 10**40, 2.5, float("1e300")),
    *("", "..", "/etc/passwd", "part-00000.json", "part-00001.json", "manifest.json", "model", "x" * 300),
    *([], {}, [[]], [0], [0, 0], [None], {"part": 0}, {"spread": 0}, {"dtype": "F32", "shape": [2], "spread": 0}),
]


def _files() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in GOLDEN.iterdir()}


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container with a key or an index of it."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield tree, key
        yield from _places(value)


def _changed(tree: Any, rng: random.Random) -> Any:
    """Change one or two things in a tree."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2))):
        places = list(_places(tree))
        if not places:
            return tree
        container, key = rng.choice(places)
        match rng.randrange(4):
            case 0:
                del container[key]
            case 1 if isinstance(container, list):
                container.insert(key, copy.deepcopy(container[key]))
            case 2:
                other, found = rng.choice(places)
                container[key] = copy.deepcopy(other[found])
            case _:
                container[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def _reader(files: dict[str, bytes], root: Any, parts: list[Any]) -> MemoryReader:
    """Seal everything again, as somebody who can write both can."""
    made = dict(files)
    for rank, part in enumerate(parts):
        data = json.dumps(part).encode()
        made[part_name(rank)] = data
        if isinstance(root, dict) and isinstance(root.get("parts"), list) and rank < len(root["parts"]):
            row = root["parts"][rank]
            if isinstance(row, list) and len(row) >= 2:
                row[0], row[1] = len(data), digests.get("xxh3-128")(data)
    made["manifest.json"] = manifests.seal(json.dumps(root).encode()[:-1])
    return MemoryReader(made)


def _used(reader: MemoryReader) -> str:
    """Use a checkpoint in every way. Return what it came to."""
    try:
        damage = verify(reader)
    except VersionUnsupported:
        return "refused"
    outcome = "damaged" if damage else "good"
    try:
        checkpoint = open_checkpoint(reader)
        checkpoint.check_small_files()
        dict(checkpoint.trees)
        load_tensors(checkpoint, None)
        assert all(record.nbytes >= 0 for record in checkpoint.manifest.files)
    except AsyncCkptError:
        assert outcome == "damaged", "verify calls good what cannot be read"
    return outcome


def _trees() -> tuple[dict[str, bytes], Any, list[Any]]:
    files = _files()
    root = json.loads(unsealed(files["manifest.json"]) + b"}")
    parts = [json.loads(files[part_name(rank)]) for rank in range(2)]
    return files, root, parts


def test_the_checkpoint_that_is_forged_is_good() -> None:
    assert _used(_reader(*_trees())) == "good"


@pytest.mark.parametrize("where", ["root", "part"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_changed_is_damage_or_reads_as_what_it_says(where: str, seed: int) -> None:
    files, root, parts = _trees()
    found = {"good": 0, "damaged": 0, "refused": 0}
    for number in range(150):
        rng = random.Random(f"{seed}/{number}")
        if where == "root":
            reader = _reader(files, _changed(root, rng), copy.deepcopy(parts))
        else:
            forged = copy.deepcopy(parts)
            forged[rng.randrange(2)] = _changed(parts[0 if rng.random() < 0.2 else 1], rng)
            reader = _reader(files, copy.deepcopy(root), forged)
        found[_used(reader)] += 1
    assert found["damaged"] > 50, found


def _without_values(root: Any, parts: list[Any]) -> None:
    parts[1]["values"].pop("loader+1")


def _without_component(root: Any, parts: list[Any]) -> None:
    parts[1]["components"].pop("loader+1")


def _of_nobody(root: Any, parts: list[Any]) -> None:
    root["components"]["loader+1"]["part"] = 2


def _of_another_kind(root: Any, parts: list[Any]) -> None:
    root["components"]["loader+1"]["kind"] = "module"


def _without_state(root: Any, parts: list[Any]) -> None:
    root["files"] = [row for row in root["files"] if row["name"] != "state.json"]


@pytest.mark.parametrize("change", [_without_values, _without_component, _of_nobody, _of_another_kind, _without_state])
def test_what_cannot_be_restored_is_damage(change: Callable[[Any, list[Any]], None]) -> None:
    files, root, parts = _trees()
    assert "loader+1" in root["components"]
    change(root, parts)
    assert _used(_reader(files, root, parts)) == "damaged"


def test_a_part_under_a_link_is_not_read(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(GOLDEN.parent, tmp_path / "run")
    part = tmp_path / "run" / GOLDEN.name / part_name(1)
    part.rename(tmp_path / "elsewhere")
    part.symlink_to(tmp_path / "elsewhere")
    reader = LocalStore(tmp_path / "run").open(GOLDEN.name)
    assert part_name(1) in {one.file for one in verify(reader)}
    reader.close()
