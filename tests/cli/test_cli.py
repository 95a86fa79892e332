"""The ``asyncckpt`` command: what it prints, what it exits with, and that it never shows a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, train
from typer.testing import CliRunner

from asyncckpt import Checkpointer, Run
from asyncckpt.cli.app import app


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, Tiny]:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with Checkpointer(tmp_path / "run", config={"lr": 0.1}) as run:
        for step in (10, 20, 30):
            train(model, optimizer)
            state = {"model": model, "optimizer": optimizer, "progress": {"step": step}}
            run.save(step, state, metrics={"loss": 1.0 / step}).result()
    return str(tmp_path / "run"), model


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def as_json(*arguments: str, code: int = 0) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def _damage(run: str, step: int) -> None:
    file = Path(run, f"step-{step:08d}", "model-00002-of-00002.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_ls_lists_every_checkpoint_and_says_what_is_damaged(saved: Any) -> None:
    run, _ = saved
    os.truncate(Path(run, "step-00000020/state.json"), 3)
    entries = as_json("ls", run)
    assert [(entry["step"], entry["damage"] is None) for entry in entries] == [(10, True), (20, False), (30, True)]
    assert entries[2]["metrics"]["loss"] == pytest.approx(1 / 30)
    table = call("ls", run)
    assert table.exit_code == 0
    assert "damaged" in table.stdout


def test_show_tells_what_is_inside(saved: Any) -> None:
    run, _ = saved
    shown = as_json("show", run, "latest", "--tensors")
    assert shown["step"] == 30
    assert shown["components"]["model"]["list"]["hidden.weight"] == {
        "dtype": "F32",
        "shape": [16, 16],
        "files": ["model-00002-of-00002.safetensors"],
    }
    assert shown["components"]["model"]["aliases"] == {"head.weight": "embed.weight"}
    assert shown["config"] == {"lr": 0.1}
    assert "torch" in shown["environment"]
    assert "hidden.weight" in call("show", run, "--tensors").stdout


def test_verify_is_good_until_a_byte_changes(saved: Any) -> None:
    run, _ = saved
    assert call("verify", run, "--all").exit_code == 0
    _damage(run, 30)
    result = call("verify", run)
    assert result.exit_code == 1
    assert "model-00002-of-00002.safetensors" in result.stdout
    found = as_json("verify", run, "--all", code=1)
    assert {entry["name"]: len(entry["damage"]) for entry in found} == {
        "step-00000010": 0,
        "step-00000020": 0,
        "step-00000030": 1,
    }


def test_diff_names_what_changed_and_by_how_much(saved: Any) -> None:
    run, _ = saved
    result = as_json("diff", run, "10", "30", code=1)
    first = Run(run).load_tensors(10, ["model.hidden.weight"])["model.hidden.weight"].double()
    last = Run(run).load_tensors(30, ["model.hidden.weight"])["model.hidden.weight"].double()
    change = result["changed"]["model.hidden.weight"]
    assert change["max_abs"] == pytest.approx((first - last).abs().max().item())
    assert change["relative"] == pytest.approx(((first - last).abs().max() / first.abs().max()).item())
    assert "model.frozen.weight" not in result["changed"]
    assert result["plain"] == {"progress.step": {"a": 10, "b": 30}}
    assert result["only_in_a"] == result["only_in_b"] == []
    assert as_json("diff", run, "30", "latest")["changed"] == {}


def test_diff_of_other_names_and_shapes(tmp_path: Path) -> None:
    for name, state in {"a": {"x": torch.ones(2), "y": torch.ones(1)}, "b": {"x": torch.ones(3), "z": 1}}.items():
        with Checkpointer(tmp_path / name) as run:
            run.save(1, state).result()
    result = as_json("diff", str(tmp_path / "a"), "1", "1", "--other", str(tmp_path / "b"), code=1)
    assert result["only_in_a"] == ["y.value"]
    assert result["reshaped"] == {"x.value": ["F32[2]", "F32[3]"]}


def test_prune_keeps_what_it_is_told_to(saved: Any) -> None:
    run, _ = saved
    assert call("pin", run, "10").exit_code == 0
    planned = as_json("prune", run, "--keep-last", "1", "--dry-run")
    assert [entry["step"] for entry in planned["deleted"]] == [20]
    assert [entry.step for entry in Run(run).ls()] == [10, 20, 30]
    assert call("prune", run, "--keep-last", "1").exit_code == 0
    assert [entry.step for entry in Run(run).ls()] == [10, 30]
    assert call("unpin", run, "10").exit_code == 0
    assert call("prune", run, "--keep-best", "loss:1:max").exit_code == 0
    assert [entry.step for entry in Run(run).ls()] == [10, 30], "the newest always stays"


def test_prune_never_leaves_only_a_damaged_checkpoint(saved: Any) -> None:
    run, _ = saved
    _damage(run, 30)
    result = call("prune", run, "--keep-last", "1")
    assert result.exit_code == 1
    assert "nothing was deleted" in result.stderr
    assert [entry.step for entry in Run(run).ls()] == [10, 20, 30]


def test_prune_is_refused_while_another_run_writes_and_reading_is_not(saved: Any) -> None:
    run, _ = saved
    with Checkpointer(run) as live:
        live.prepare({"w": torch.zeros(1)})
        result = call("prune", run, "--keep-last", "1")
        assert result.exit_code == 4
        assert f"pid {os.getpid()}" in result.stderr.replace("\n", " ")
        for verb in (["ls", run], ["verify", run], ["show", run], ["prune", run, "--keep-last", "1", "--dry-run"]):
            assert call(*verb).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["ls", "{run}-missing"], 3, "no such run directory"),
        (["show", "{run}", "99"], 3, "no checkpoint of step 99"),
        (["show", "{run}", "newest"], 2, "no step"),
        (["prune", "{run}"], 2, "--keep-"),
        (["export", "{run}", "10", "out.zip"], 2, "ends in .safetensors, .pt"),
        (["export", "{run}", "10", "x.pt", "--component", "nope"], 2, "components are model"),
        (["export", "{run}", "10", "x.pt", "--component", "model", "--all"], 2, "not both"),
        (["export", "{run}", "10", "{run}-missing/x.pt"], 5, "does not exist"),
        (["prune", "{run}", "--keep-best", "lose:1"], 2, "there are: loss"),
        (["prune", "{run}", "--keep-best", "loss:one"], 2, "METRIC:N"),
        (["prune", "{run}", "--keep-best", "loss:1:least"], 2, "min"),
        (["prune", "{run}", "--keep-last", "0"], 2, ">= 1"),
        (["diff", "{run}", "10"], 2, "Missing argument"),
        (["pin", "{run}", "99"], 3, "no checkpoint of step 99"),
        (["verify", "{run}", "99"], 3, "no checkpoint of step 99"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(saved: Any, arguments: list[str], code: int, text: str) -> None:
    result = call(*(part.replace("{run}", saved[0]) for part in arguments))
    assert result.exit_code == code
    assert text in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_an_error_that_is_not_about_checkpoints_is_one_line_too(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_run: Run) -> Any:
        raise PermissionError(13, "Permission denied", "a\nb")

    monkeypatch.setattr(Run, "ls", refused)
    result = call("ls", saved[0])
    assert result.exit_code == 5
    assert len(result.stderr.splitlines()) == 1
    assert "Permission denied" in result.stderr


def test_every_verb_documents_its_exit_codes_and_speaks_json() -> None:
    for verb in ("ls", "show", "verify", "diff", "prune", "pin", "unpin", "export", "demo"):
        text = " ".join(call(verb, "--help").stdout.split())
        assert "Exit codes" in text, verb
        assert "--json" in text, verb


def test_json_of_metrics_that_json_lacks_still_parses(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, {"w": torch.ones(1)}, metrics={"up": float("inf"), "none": float("nan")}).result()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for verb in ("ls", "show"):
        parsed = json.loads(call(verb, str(tmp_path / "run"), "--json").stdout, parse_constant=refuse)
        entry = parsed[0] if verb == "ls" else parsed
        assert entry["metrics"] == {"up": "inf", "none": "nan"}


def test_the_demos_story_stays_off_stdout_under_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import asyncckpt.demo

    def story(out: Path, *, steps: int) -> int:
        print(f"training {steps} steps in {out}")
        return 1

    monkeypatch.setattr(asyncckpt.demo, "run", story)
    assert as_json("demo", "--out", str(tmp_path), "--steps", "12", code=1)["bit_equal"] is False
    result = call("demo", "--out", str(tmp_path), "--steps", "12")
    assert (result.exit_code, "training 12 steps" in result.stdout) == (1, True)


def test_the_installed_command_runs_and_documents_its_exit_codes(saved: Any) -> None:
    command = [sys.executable, "-c", "from asyncckpt.cli import main; main()"]
    done = subprocess.run([*command, "verify", saved[0]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    helped = subprocess.run([*command, "verify", "--help"], capture_output=True, text=True, check=True)
    assert "Exit codes" in helped.stdout
    assert (
        "--install-completion"
        in subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    )


def test_without_its_extra_the_command_says_what_to_install() -> None:
    script = "import sys; sys.modules['typer'] = None; from asyncckpt.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "asyncckpt[cli]" in done.stderr
