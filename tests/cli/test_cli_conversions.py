"""``asyncckpt import`` and ``export``: what they print, choose, rename, drop and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.foreign import bits, module_bits
from typer.testing import CliRunner

from asyncckpt import Run
from asyncckpt.cli.app import app

WEIGHTS = {"net.a.w": torch.arange(6.0).reshape(2, 3), "net.a.b": torch.ones(2), "net.c": torch.tensor(3)}


def call(*arguments: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save({"model": WEIGHTS, "epoch": 3, "odd": slice(1)}, tmp_path / "in.pt")
    return tmp_path / "in.pt"


def test_import_says_what_a_file_became_and_refuses_what_it_would_lose(source: Path, tmp_path: Path) -> None:
    refused = call("import", source, tmp_path / "run", "5", code=5)
    assert "odd" in refused.stderr
    assert "--drop" in refused.stderr
    done = call("import", source, tmp_path / "run", "5", "--drop", "odd")
    assert "'model' became the module of 3 tensors 'model'" in done.stdout
    assert "'epoch' became the tree 'epoch'" in done.stdout
    assert "left out: odd" in done.stderr
    assert module_bits(Run(tmp_path / "run")) == bits(WEIGHTS)
    assert call("import", source, tmp_path / "run", "5", "--drop", "*", code=5).stderr.count("already exists") == 1
    call("convert", source, tmp_path / "run", "5", "--skip-unsupported", "--force")


def test_the_source_and_its_digest_are_in_the_manifest(tmp_path: Path) -> None:
    import hashlib

    save_file(WEIGHTS, tmp_path / "in.safetensors")
    call("import", tmp_path / "in.safetensors", tmp_path / "run", "5", "--digest", "sha256")
    shown = json.loads(call("show", tmp_path / "run", "--json").stdout)
    origin = shown["environment"]["imported"]
    assert origin["format"] == "safetensors"
    found = hashlib.sha256((tmp_path / "in.safetensors").read_bytes()).hexdigest()
    assert origin["files"]["in.safetensors"]["sha256"] == found
    assert "imported" in call("show", tmp_path / "run").stdout


def test_both_verbs_choose_and_rename(source: Path, tmp_path: Path) -> None:
    options = ("--include", "model.net.*", "--exclude", "*.b", "--rename", "net.a=first", "--rename", "net=")
    done = json.loads(call("import", source, tmp_path / "run", "5", *options, "--json").stdout)
    assert done["components"] == {"model": "module"}
    found = Run(tmp_path / "run").load(component="model")
    assert set(found) == {"first.w", "c"}
    call("export", tmp_path / "run", "5", tmp_path / "out.safetensors", "--include", "first*", "--rename", "first=x.y")
    assert bits(load_file(tmp_path / "out.safetensors")) == bits({"x.y.w": WEIGHTS["net.a.w"]})
    call("import", tmp_path / "out.safetensors", tmp_path / "run", "6", "--component", "teacher")
    assert set(Run(tmp_path / "run").load(6)) == {"teacher"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--include", "nothing*"], "nothing there is called so: --include nothing*"),
        (["--rename", "nothing=x"], "--rename nothing"),
        (["--rename", "x"], "OLD=NEW"),
        (["--rename", "net.a.w=one", "--rename", "net.a.b=one"], "would both be called 'one'"),
        (["--format", "word"], "formats are safetensors"),
    ],
)
def test_misspelt_choices_are_refused(source: Path, tmp_path: Path, options: list[str], words: str) -> None:
    refused = call("import", source, tmp_path / "run", "5", "--drop", "*", *options, code=2)
    assert words in refused.stderr.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_values_beside_tensors_are_no_silent_loss(source: Path, tmp_path: Path) -> None:
    call("import", source, tmp_path / "run", "5", "--drop", "odd")
    refused = call("export", tmp_path / "run", "5", tmp_path / "out.safetensors", "--all", code=5)
    assert "epoch" in refused.stderr
    assert not (tmp_path / "out.safetensors").exists()
    call("export", tmp_path / "run", "5", tmp_path / "out.safetensors", "--all", "--drop", "epoch")
    assert set(load_file(tmp_path / "out.safetensors")) == {f"model.{name}" for name in WEIGHTS}


def test_shards_of_a_size_and_a_size_that_is_none(source: Path, tmp_path: Path) -> None:
    call("import", source, tmp_path / "run", "5", "--drop", "odd")
    call("export", tmp_path / "run", "5", tmp_path / "out", "--format", "safetensors", "--shard-size", "24B")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert "5GB" in call("export", tmp_path / "run", "5", tmp_path / "x", "--shard-size", "much", code=2).stderr
