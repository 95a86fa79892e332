"""Assets: what a program gives beside the state is published with each checkpoint, verified, and never in the way."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import asyncckpt
from asyncckpt import (
    CheckpointDamaged,
    Checkpointer,
    Delta,
    InvalidOption,
    KeepLast,
    NotEnoughSpace,
    Run,
    RunOptions,
    Safetensors,
    WriterOptions,
    Zarr,
)
from asyncckpt.manifest import json as manifests
from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.memory import MemoryBucket, MemoryStore
from asyncckpt.testing import FaultyOps

KINDS = [Safetensors(), Safetensors(codec="planes", delta=Delta()), Zarr()]


class Tokenizer:
    """Writes itself as tokenizers do."""

    def __init__(self, *names: str) -> None:
        self.names = names or ("tokenizer.json", "templates/chat.jinja")

    def save_pretrained(self, directory: str) -> None:
        for name in self.names:
            Path(directory, name).parent.mkdir(exist_ok=True)
            Path(directory, name).write_text(f"{name}!")


def state() -> dict[str, Any]:
    return {"model": torch.nn.Linear(30, 30), "n": 7}


@pytest.mark.parametrize("files", KINDS, ids=lambda files: type(files).__name__)
def test_whatever_is_given_is_in_every_checkpoint(files: Any, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("lr: 1")
    (tmp_path / "link.yaml").symlink_to(config)
    common = {
        "t": Tokenizer(),
        "other/": Tokenizer("vocab.txt"),
        "a.yaml": config,
        "deep/": str(tmp_path / "link.yaml"),
    }
    expected = {
        "tokenizer.json": b"tokenizer.json!",
        "templates/chat.jinja": b"templates/chat.jinja!",
        "other/vocab.txt": b"vocab.txt!",
        "a.yaml": b"lr: 1",
        "deep/link.yaml": b"lr: 1",
    }
    with Checkpointer(tmp_path / "run", files=files, assets=common, every=1) as run:
        config.write_text("changed after the constructor read it")
        run.save(1, state()).result()
        own = {"notes/é.txt".replace("é", "e"): bytearray(b"this one"), "a.yaml": memoryview(b"its own"), "empty": b""}
        run.save(2, state(), assets=own).result()
        pending = run.step(3, state(), assets=[Tokenizer("third.txt")])
        assert pending is not None
        path = Path(pending.result().path)
        assert run.assets(1) == expected
        assert run.assets(2) == expected | {"notes/e.txt": b"this one", "a.yaml": b"its own", "empty": b""}
        assert run.assets() == expected | {"third.txt": b"third.txt!"}
    run_again = Run(tmp_path / "run")
    assert [(entry.damage, entry.extra) for entry in run_again.ls()] == [(None, ())] * 3
    assert all(run_again.verify(step) == [] for step in (1, 2, 3))
    assert (path / "other" / "vocab.txt").read_bytes() == b"vocab.txt!"
    restored = state()
    assert run_again.restore(restored).step == 3


def test_a_run_without_assets_has_none(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as run:
        path = Path(run.save(1, state()).result().path)
        assert run.assets(1) == {}
    assert b'"assets"' not in (path / manifests.FILE_NAME).read_bytes()


REFUSED: list[tuple[Any, str]] = [
    ({"../x": b""}, "no name"),
    ({"/x": b""}, "no name"),
    ({"a//b": b""}, "no name"),
    ({".hidden": b""}, "no name"),
    ({"a b": b""}, "no name"),
    ({"a/b/c/d": b""}, "no name"),
    ({"x" * 300: b""}, "no name"),
    ({"": b""}, "no name"),
    ({1: b""}, "no name"),
    ({"a": b"", "A": b""}, "differ only in case"),
    ({"a": b"", "a/b": b""}, "folder that is a file"),
    ({"A": b"", "a/b/c": b""}, "folder that is a file"),
    ({"manifest.json": b""}, "use themselves"),
    ({"State.json": b""}, "use themselves"),
    ({"sub/zarr.json": b""}, "use themselves"),
    ({"base/x": b""}, "use themselves"),
    ({"m.safetensors": b""}, "named as weights"),
    ({"model.safetensors.index.json": b""}, "named as weights"),
    ({"pytorch_model.BIN": b""}, "named as weights"),
    ({"optimizer.pt": b"PK\x03\x04"}, "named as weights"),
    ({"optimizer.pt": b"text " * 1000}, "named as weights"),
    ({"part-00000.json": b"{}"}, "use themselves"),
    ({"Part-000001.JSON": b"{}"}, "use themselves"),
    ({"model.safetensors": b"a notice"}, "named as weights"),
    ({"x": "there is no such file"}, "cannot be read"),
    ({"x": "a\0b"}, "cannot be read"),
    ({"x": "/"}, "directory"),
    ({"x": 3}, "of type int"),
    ({"x": None}, "of type NoneType"),
    ({"x": Tokenizer}, "of type type"),
    ({"x/": b""}, "bytes need a name"),
    ([b""], "bytes need a name"),
    ([Tokenizer("a"), Tokenizer("a")], "two assets"),
    ("train.yaml", "must be a dict"),
    (Tokenizer(), "must be a dict"),
    ([torch.nn.Linear(1, 1)], "weights"),
    ([SimpleNamespace(save_pretrained=print, components={"unet": torch.nn.Linear(1, 1)})], "weights"),
    ([Tokenizer("model.safetensors")], "weights"),
    ([Tokenizer("sub/adapter_model.bin")], "weights"),
    ([SimpleNamespace(save_pretrained=lambda _: None)], "wrote no file"),
    ([SimpleNamespace(save_pretrained=lambda: None)], "save_pretrained failed"),
    ({"x": bytes(100_001)}, "more than 100000 bytes"),
    ({"x": bytes(60_000), "y": bytes(60_000)}, "more than 100000 bytes"),
    ({"x": "/dev/zero"}, "a device"),
]


@pytest.mark.parametrize(("given", "problem"), REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_what_cannot_be_an_asset_is_refused_with_a_way_out(given: Any, problem: str, tmp_path: Path) -> None:
    options = WriterOptions(asset_bytes=100_000)
    with pytest.raises(InvalidOption, match=problem):
        Checkpointer(tmp_path / "run", assets=given, writer=options)
    with Checkpointer(tmp_path / "run", writer=options) as run:
        with pytest.raises(InvalidOption, match=problem):
            run.save(1, state(), assets=given)
        run.save(1, state()).result()  # the step is free
    assert not list(tmp_path.glob("run/.tmp*"))


def test_those_of_a_save_are_checked_together_with_those_of_all(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, assets={"a.txt": bytes(60)}, writer=WriterOptions(asset_bytes=100)) as run:
        with pytest.raises(InvalidOption, match="only in case"):
            run.save(1, state(), assets={"A.txt": b""})
        with pytest.raises(InvalidOption, match="more than 100 bytes"):
            run.save(1, state(), assets={"b.txt": bytes(60)})
        run.save(1, state(), assets={"a.txt": bytes(100)}).result()


def test_an_asset_does_not_lie_in_the_directory_of_an_array(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, files="zarr", assets={"Model/readme": b""}) as run:
        with pytest.raises(InvalidOption, match="component's directory"):
            run.save(1, state())
        run.save(1, {"net": state()["model"]}).result()
        assert run.assets(1) == {"Model/readme": b""}


def test_a_damaged_asset_is_found_and_keeps_no_training_from_going_on(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, assets={"config.json": b"{}" * 50}) as run:
        for step in (1, 2):
            run.save(step, state()).result()
    file = tmp_path / "step-00000002" / "config.json"
    file.write_bytes(b"[]" * 50)
    run_again = Run(tmp_path)
    assert [damage.file for damage in run_again.verify()] == ["config.json"]
    with pytest.raises(CheckpointDamaged, match=r"config\.json"):
        run_again.assets(2)
    assert run_again.assets(1) == {"config.json": b"{}" * 50}
    with Checkpointer(tmp_path) as run:
        assert run.resume(state()) == 2
    file.unlink()
    assert "config.json" in str(Run(tmp_path).ls()[-1].damage)


def test_assets_come_and_go_with_their_checkpoint(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=KeepLast(1), run=RunOptions(overwrite=True)) as run:
        run.save(1, state(), assets={"old.txt": b"1"}).result()
        run.save(1, state(), assets={"new.txt": b"2"}).result()
        run.wait()
        assert run.assets(1) == {"new.txt": b"2"}
        run.save(2, state()).result()
    assert [entry.step for entry in Run(tmp_path).ls()] == [2]
    assert not list(tmp_path.rglob("*.txt"))


def test_assets_need_their_room(tmp_path: Path) -> None:
    run = Checkpointer(tmp_path, assets={"large": bytes(8 << 20)})
    run._store.free_bytes = lambda: 10 << 20  # type: ignore[method-assign]
    with pytest.raises(NotEnoughSpace):
        run.save(1, state()).result()
    run.close()


def test_a_save_whose_asset_cannot_be_written_publishes_nothing(tmp_path: Path) -> None:
    run = Checkpointer(tmp_path, assets={"config.json": b"{}"})
    assert isinstance(run._store, LocalStore)
    ops = run._store.ops = FaultyOps()
    ops.fail = ("write_file", 2, errno.EIO)  # state.json is the first
    with pytest.raises(asyncckpt.SaveFailed):
        run.save(1, state()).result()
    run.close()
    assert Run(tmp_path).ls() == []


def test_an_asset_costs_one_file_and_its_folder(tmp_path: Path) -> None:
    found: list[Counter[str]] = []
    for number, assets in enumerate(({}, {"a.txt": b"a", "b.txt": b"b"}, {"c/d.txt": b"c"})):
        with Checkpointer(tmp_path / str(number), assets=assets) as run:
            ops = run._store.ops = FaultyOps()  # type: ignore[attr-defined]
            run.save(1, state()).result()
            run.wait()
            found.append(Counter(call for call, _ in ops.log))
    without, with_two, in_a_folder = found
    assert without["write_file"] == 3, "state.json, the index, the manifest"
    assert with_two - without == {"write_file": 2, "fsync": 2}
    assert in_a_folder - without == {"write_file": 1, "fsync": 1, "mkdir": 1, "fsync_directory": 1}


def test_a_bucket_has_assets_too() -> None:
    bucket = MemoryBucket("memory://assets")
    options = RunOptions(store=MemoryStore(bucket))
    with Checkpointer("anywhere", run=options, assets={"a/b.json": b"{}"}) as run:
        run.save(1, state(), name="last").result()
        run.save(2, state(), name="last").result()
        assert run.assets("last") == {"a/b.json": b"{}"}
        assert run.verify("last") == []
        assert run.restore(state(), "last").step == 2


# -- the index ---------------------------------------------------------------------------------------------------------


def net() -> torch.nn.Module:
    return torch.nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("made", "indexed"),
    [
        (lambda: {"model": net(), "ema": net(), "opt": {"x": torch.ones(2)}}, "model"),
        (lambda: {"unet": net(), "extra": {"x": torch.ones(2)}}, "unet"),
        (lambda: {"generator": net(), "critic": net()}, None),
        (lambda: {"values": {"x": torch.ones(2)}}, None),
    ],
)
def test_a_checkpoint_has_one_index_at_most(
    made: Callable[[], dict[str, Any]], indexed: str | None, tmp_path: Path
) -> None:
    with Checkpointer(tmp_path) as run:
        path = Path(run.save(1, made()).result().path)
    found = [file.name for file in path.glob("*.index.json")]
    assert found == (["model.safetensors.index.json"] if indexed else [])
    if indexed:
        files = set(json.loads((path / found[0]).read_text())["weight_map"].values())
        assert all(file.startswith(f"{indexed}-") and os.path.exists(path / file) for file in files)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (b'{"_diffusers_version": "0.40"}', "diffusion_pytorch_model"),
        (b'{"model_type": "llama"}', "model"),
        (b'{"x": "\\"_diffusers_version\\""}', "model"),
        (b'"_diffusers_version" is no JSON', "model"),
        (b'["_diffusers_version"]', "model"),
    ],
)
def test_the_index_has_the_name_that_its_reader_looks_for(config: bytes, name: str, tmp_path: Path) -> None:
    with Checkpointer(tmp_path, assets={"config.json": config}) as run:
        path = Path(run.save(1, {"unet": net()}).result().path)
    assert [file.name for file in path.glob("*.index.json")] == [f"{name}.safetensors.index.json"]


def test_a_notice_may_lie_where_others_look_for_weights(tmp_path: Path) -> None:
    notice = b"the optimizer lies elsewhere\nlook there\n"
    with Checkpointer(tmp_path, assets={"optimizer.pt": notice}) as checkpointer:
        checkpointer.save(1, {"x": torch.ones(2)}).result()
    assert Run(tmp_path).assets(1) == {"optimizer.pt": notice}
