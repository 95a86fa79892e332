"""The promise of compatibility: checkpoints that every earlier version wrote come back to the bit.

``tests/golden`` holds them with the digests of all they have to give; its README says which commit wrote which. What is
read is compared with these digests alone, never with something that this version wrote or read.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import make, states
from support.harness import Crew, Me

from asyncckpt import Run, VersionUnsupported
from asyncckpt.manifest.json import FORMAT_VERSION, seal

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

GOLDEN = Path(make.__file__).parent
EXPECTED: dict[str, dict[str, Any]] = {
    file.stem: json.loads(file.read_text()) for file in sorted(GOLDEN.glob("v*.json"))
}
CHECKPOINTS = [(name, int(step)) for name, entry in EXPECTED.items() for step in entry["steps"]]
BY_RANKS = [name for name, entry in make.ENTRIES.items() if entry.ranks > 1]


@pytest.fixture(autouse=True)
def generators_go_on() -> Iterator[None]:
    """Restoring a training state sets the generators of the process."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    torch.set_rng_state(kept[2])


def _copied(name: str, to: Path) -> Path:
    """A copy of the run, in which every file stands alone: git keeps no hard links either."""
    return Path(shutil.copytree(GOLDEN / name, to / name))


def _wrong(found: dict[str, str], expected: dict[str, str]) -> dict[str, Any]:
    """What differs; empty means bit-equal, with nothing too much and nothing missing."""
    names = found.keys() | expected.keys()
    return {name: (found.get(name), expected.get(name)) for name in names if found.get(name) != expected.get(name)}


# -- the corpus is whole ---------------------------------------------------------------------------------------------


def test_every_format_version_has_checkpoints_and_every_entry_is_there() -> None:
    covered: set[int] = set()
    for name, entry in make.ENTRIES.items():
        manifests = sorted((GOLDEN / name).glob("*step-*/manifest.json"))
        assert len(manifests) == len(entry.saves) == len(EXPECTED[name]["steps"]), name
        versions = {json.loads(file.read_text())["format_version"] for file in manifests}
        assert versions == set(entry.versions) == set(EXPECTED[name]["versions"]), name
        assert EXPECTED[name]["commit"] == entry.commit, name
        covered |= versions
    assert covered == set(range(1, FORMAT_VERSION + 1)), (
        f"the format is at version {FORMAT_VERSION} and tests/golden has {sorted(covered)}: its README says how to add "
        f"the checkpoint that keeps the new version readable"
    )
    folders = {path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(make.ENTRIES) == set(EXPECTED), "who left an entry out, or one over?"


def test_the_corpus_holds_what_each_entry_is_there_for() -> None:
    """Entries whose features had vanished would keep no promise about them."""

    def text(name: str) -> str:
        return "".join(file.read_text() for file in (GOLDEN / name).glob("*step-*/manifest.json"))

    assert all(
        ('"sequence":' in text(name)) == (entry.commit in ("26ebec8", "93233c1", "452f0d1", "613887f", "9e01b23"))
        for name, entry in make.ENTRIES.items()
    )
    assert all('"bases":' in text(name) for name in make.ENTRIES if "delta" in name)
    assert all('"boxes":' in text(name) for name in make.ENTRIES if name.startswith("v3-"))
    assert all('"parts":' in text(name) for name in make.ENTRIES if name.startswith("v5-"))
    assert all('"zarr"' in text(name) for name in make.ENTRIES if "zarr" in name)
    assert all('"loader+1":' in text(name) for name in BY_RANKS if "dcp" not in name)
    assert '"order":' in text("v2-delta-0266a1c")
    kept = "".join(file.read_text() for file in (GOLDEN / "v4-wrapped-452f0d1").glob("*step-*/state.json"))
    assert all(f'"$":"{tag}"' in kept for tag in ("wrapper", "object"))
    for codec in ("zstd", "lz4", "blosc", "auto", "planes"):
        assert any(f'"name":"{codec}"' in text(name) for name in make.ENTRIES), codec


def test_the_readme_has_a_row_for_each_entry() -> None:
    rows = re.findall(r"^\| `(v[^`]+)` \| `(\w+)` \| (\d)", (GOLDEN / "README.md").read_text(), re.MULTILINE)
    assert rows == [(name, entry.commit, str(*entry.versions)) for name, entry in make.ENTRIES.items()]


# -- it comes back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "step"), CHECKPOINTS, ids=str)
def test_what_older_versions_wrote_comes_back_to_the_bit(name: str, step: int, tmp_path: Path) -> None:
    expected = EXPECTED[name]["steps"][str(step)]
    run = Run(_copied(name, tmp_path))
    assert run.verify(step) == []
    _is_listed(run, name, step, expected["kind"])
    loaded = {key: states.described(tensor) for key, tensor in run.load_tensors(step).items()}
    plain = {key for key in loaded if key.startswith("values.")}  # tensors within plain values are looked at below
    assert not _wrong({key: text for key, text in loaded.items() if key not in plain}, expected["tensors"])
    if EXPECTED[name]["by_dcp"]:
        found = _restored_by_dcp(run.path, expected["state"], step)
    else:
        live = states.build(expected["state"], step + 50)
        if expected["kind"] == "weights":
            live = {"model": live["model"]}
        assert _wrong(states.contents(live), expected["alone"]), "nothing would have to be restored"
        run.restore(live, step)
        found = states.contents(live)
    assert not _wrong(
        found, {key: text for key, text in expected["alone"].items() if key in found or "dcp" not in name}
    )


def test_assets_and_names_come_back(tmp_path: Path) -> None:
    (name,) = (name for name in make.ENTRIES if "named" in name)
    run = Run(_copied(name, tmp_path))
    given = {key: text.encode() for key, text in make.ENTRIES[name].saves[0].options["assets"].items()}
    assert [(entry.step, entry.names) for entry in run.ls()] == [(1, ("epoch=1", "last")), (2, ("last",))]
    for which, step in (("epoch=1", 1), ("last", 2)):
        assert run.assets(which) == given
        assert run.restore({"values": states.build("values", 7)["values"]}, which).step == step


def _is_listed(run: Run, name: str, step: int, kind: str) -> None:
    entries = run.ls()
    assert [entry.step for entry in entries] == sorted(map(int, EXPECTED[name]["steps"]))
    (entry,) = [one for one in entries if one.step == step]
    assert (entry.kind, entry.damage) == (kind, None)
    if not EXPECTED[name]["by_dcp"]:
        assert set(entry.metrics) == set(make.METRICS)
        assert entry.metrics["loss"] == make.METRICS["loss"]
        assert math.isnan(entry.metrics["lost"])


@pytest.mark.parametrize("name", [name for name, entry in EXPECTED.items() if "full" in str(entry["steps"])])
def test_each_checkpoint_needs_no_other(name: str, tmp_path: Path) -> None:
    for folder in (GOLDEN / name).glob("step-*"):
        alone = tmp_path / f"alone-{folder.name}"
        shutil.copytree(folder, alone / folder.name)
        assert Run(alone).verify() == []
        found = {key: states.described(tensor) for key, tensor in Run(alone).load_tensors().items()}
        expected = EXPECTED[name]["steps"][str(int(folder.name.removeprefix("step-")))]["tensors"]
        assert expected.items() <= found.items()


@pytest.mark.parametrize("name", ["v1-safetensors-4bfd2d8", "v1-safetensors-26ebec8"])
def test_what_is_too_new_is_refused_and_nothing_older_takes_its_place(name: str, tmp_path: Path) -> None:
    path = _copied(name, tmp_path)
    newest = path / "step-00000003" / "manifest.json"
    body, _, _ = newest.read_bytes().rpartition(b',"manifest_digest"')
    newest.write_bytes(seal(body.replace(b'"format_version":1', b'"format_version":%d' % (FORMAT_VERSION + 1))))
    run, live = Run(path), states.build("middle", 50)
    for look in (lambda: run.restore(live), lambda: run.restore(live, 3), lambda: run.load_tensors(3)):
        with pytest.raises(VersionUnsupported, match=rf"version {FORMAT_VERSION + 1}.*Upgrade"):
            look()
    run.restore(live, 2)
    assert not _wrong(states.contents(live), EXPECTED[name]["steps"]["2"]["alone"])


def test_reading_writes_nothing(tmp_path: Path) -> None:
    run = Run(_copied("v1-safetensors-4bfd2d8", tmp_path))

    def seen() -> dict[str, tuple[bytes, int]]:
        files = [file for file in Path(run.path).rglob("*") if file.is_file()]
        return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}

    before = seen()
    run.restore(states.build("values", 9), 3)
    run.load_tensors(2)
    assert run.verify(1) == []
    assert len(run.ls()) == 4
    assert seen() == before


@pytest.mark.parametrize("name", [name for name, entry in make.ENTRIES.items() if entry.ranks == 1])
def test_training_goes_on_where_an_older_version_stopped(name: str, tmp_path: Path) -> None:
    """The next save compares itself with the old checkpoint, may link files of it, or build a difference on it."""
    path = _copied(name, tmp_path)
    last = max((save for save in make.ENTRIES[name].saves if not save.weights_only), key=lambda save: save.step)
    expected = EXPECTED[name]["steps"][str(last.step)]
    live = states.build(last.state, last.step + 50)
    with make.checkpointer(path, last.options) as run:
        assert run.resume(live) == last.step
        assert not _wrong(states.contents(live), expected["alone"])
        run.save(9, live).result(60)
        assert run.verify(9) == run.verify(last.step) == []
    for step in (9, last.step):
        loaded = {key: states.described(tensor) for key, tensor in Run(path).load_tensors(step).items()}
        assert expected["tensors"].items() <= loaded.items()


# -- by ranks --------------------------------------------------------------------------------------------------------


def test_two_ranks_get_back_what_each_had(tmp_path: Path) -> None:
    paths = {name: str(_copied(name, tmp_path)) for name in BY_RANKS}
    with Crew(2) as crew:
        for name, path in paths.items():
            for step, expected in EXPECTED[name]["steps"].items():
                arguments = (path, expected["state"], int(step), EXPECTED[name]["by_dcp"])
                for rank, found in enumerate(crew.values(_restore_by_ranks, *arguments)):
                    wanted = expected["ranks"][rank]
                    if EXPECTED[name]["by_dcp"]:
                        wanted = {key: text for key, text in wanted.items() if key in found}
                    assert not _wrong(found, wanted), f"{name}, step {step}, rank {rank}"


def _restore_by_ranks(me: Me, path: str, state: str, step: int, by_dcp: bool) -> dict[str, str]:
    if by_dcp:
        return _restored_by_dcp(path, state, step, me.rank, me.size)
    from asyncckpt import Checkpointer

    live = states.build(state, step + 50, me.rank, me.size)
    with Checkpointer(path) as run:
        run.restore(live, step)
    return states.contents(live)


def _restored_by_dcp(path: str, state: str, step: int, rank: int = 0, size: int = 1) -> dict[str, str]:
    """Model and optimizer through ``torch.distributed.checkpoint``, which gives nothing else back."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from asyncckpt.integrations.dcp import Reader

    live = states.build(state, step + 50, rank, size)
    weights, moments = get_state_dict(live["model"], live["optimizer"])
    plain: dict[str, Any] = {"model": weights, "optim": moments, "meta": {"name": "", "sizes": [0, 0.0]}}
    dcp.load(plain, storage_reader=Reader(f"{path}/step-{step:08d}"), no_dist=size == 1)
    assert plain["meta"] == {"name": "golden", "sizes": [1, 2.5]}
    set_state_dict(live["model"], live["optimizer"], model_state_dict=plain["model"], optim_state_dict=plain["optim"])
    return states.contents({"model": live["model"], "optimizer": live["optimizer"]})
