"""docs/guide.md: each command of the page is run, in its order, on the run that the page describes."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from asyncckpt import Run
from asyncckpt.cli.app import app

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("onnx")
pytest.importorskip("plotly")

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guide.md"
#: These end with another code than 0, as they should: the two differ.
CODES = {"diff": 1}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    return [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the page's Python: train, with names that the page leaves to its reader."""
    path = tmp_path_factory.mktemp("guide")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=300, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps = iter(range(10_000))

    def train_step() -> float:
        if next(steps) % 500 > 1:  # the page counts to 3000; a few of these do for a test
            return 1.0
        loss = model(input_ids=(ids := torch.randint(0, 300, (2, 16))), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    names: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "tokens_seen": 1000,
        "total": 3000,
        "train_step": train_step,
        "validate": lambda step: abs(step - 2500) / 1000,
    }
    (script,) = blocks("python")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        exec(compile(script, str(PAGE), "exec"), names)
    return path


def test_the_run_is_what_the_page_says(folder: Path) -> None:
    assert [(entry.step, entry.kind) for entry in Run(folder / "gpt-run").ls()] == [
        (1000, "weights"),
        (2000, "full"),
        (2500, "full"),
        (3000, "full"),
    ]


def test_every_command_of_the_page_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "guide"))
    ran = commands()
    assert len(ran) > 30
    for command in ran:
        program, *arguments = shlex.split(command)
        assert program == "asyncckpt"
        result = CliRunner().invoke(app, arguments)
        expected = (0, 1) if arguments[0] == "doctor" else (CODES.get(arguments[0], 0),)  # this disk may be unsafe
        assert result.exit_code in expected, (command, result.output, result.exception)
    assert Run("gpt-run").verify("soup") == []
    assert Path("report.html").stat().st_size > 4_000_000


def test_the_page_has_a_line_for_every_verb() -> None:
    """What a user can do with checkpoints stands on the page, but for what only looks at the library itself."""
    used = {command.split()[1] for command in commands()} | {"demo"}
    verbs = {str(command.name or getattr(command.callback, "__name__", "")) for command in app.registered_commands}
    assert {verb.rstrip("_") for verb in verbs} - used <= {"unpin", "convert"}
