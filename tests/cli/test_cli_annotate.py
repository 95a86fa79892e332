"""``asyncckpt annotate`` and ``verify --require``: what they print, what they exit with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.branches import saved
from typer.testing import CliRunner

from asyncckpt import Run
from asyncckpt.cli.app import app


@pytest.fixture
def run(tmp_path: Path) -> str:
    saved(tmp_path / "run", 1, 2)
    return str(tmp_path / "run")


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_what_is_annotated_shows_in_ls_and_show(run: str) -> None:
    assert call("annotate", run, "1", "val_loss=0.25", "acc=nan", "a=b=3").exit_code == 0
    assert dict(Run(run).ls()[0].annotated) | {"acc": 0} == {"val_loss": 0.25, "acc": 0, "a=b": 3.0}
    assert "val_loss=0.25" in call("ls", run).stdout
    assert "annotated later: val_loss=0.25" in call("show", run, "1").stdout
    row = json.loads(call("ls", run, "--json").stdout)[0]
    assert row["annotated"] == row["metrics"] == {"val_loss": 0.25, "acc": "nan", "a=b": 3.0}
    assert json.loads(call("annotate", run, "latest", "x=1", "--json").stdout)["step"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["1", "val_loss"], 2, "NAME=NUMBER"),
        (["1", "val_loss=low"], 2, "'val_loss=low'"),
        (["1", "=3"], 2, "printable text"),
        (["1", "a=1", "a=2"], 2, "given twice"),
        (["7", "a=1"], 3, "no checkpoint of step 7"),
        (["one", "a=1"], 2, "'one' is no step"),
    ],
)
def test_what_cannot_be_annotated_is_told_in_one_line(run: str, arguments: list[str], code: int, told: str) -> None:
    result = call("annotate", run, *arguments)
    assert (result.exit_code, told in result.stderr) == (code, True), result.output
    assert len(result.stderr.splitlines()) == 1
    assert not any(entry.annotated for entry in Run(run).ls())


@pytest.mark.parametrize("every", [[], ["--all"]], ids=["latest", "all"])
def test_components_that_must_be_there_are_checked(run: str, every: list[str]) -> None:
    assert call("verify", run, *every, "--require", "w, meta").exit_code == 0
    result = call("verify", run, *every, "--require", "w,optimizer")
    assert result.exit_code == 1
    assert "no component 'optimizer'; it has: meta, w" in result.stdout
    rows = json.loads(call("verify", run, *every, "--require", "w,optimizer", "--json").stdout)
    assert all("optimizer" in row["damage"][0]["problem"] for row in rows)


@pytest.mark.parametrize("names", ["", "w,", "w.value"])
def test_what_is_no_component_is_wrong_usage(run: str, names: str) -> None:
    result = call("verify", run, "--require", names)
    assert (result.exit_code, "require" in result.stderr) == (2, True)
