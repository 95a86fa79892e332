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
from conftest import Tiny, bits, train
from safetensors.torch import load_file
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
    file = Path(run, f"step-{step:08d}", "model-00001-of-00001.safetensors")
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
        "file": "model-00001-of-00001.safetensors",
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
    assert "model-00001-of-00001.safetensors" in result.stdout
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
    assert result["plain"] == ["progress.step"]
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


def test_exported_weights_open_in_other_tools(saved: Any, tmp_path: Path) -> None:
    run, model = saved
    out = tmp_path / "weights.safetensors"
    assert call("export", run, "latest", str(out)).exit_code == 0
    flat = load_file(out)
    assert flat.keys() == model.state_dict().keys() - {"head.weight"}
    assert all(bits(model.state_dict()[name]) == bits(tensor) for name, tensor in flat.items())
    pt = tmp_path / "weights.pt"
    assert call("export", run, "30", str(pt), "--dtype", "bf16").exit_code == 0
    fresh = Tiny().to(torch.bfloat16)
    fresh.load_state_dict(torch.load(pt, weights_only=True))
    assert bits(fresh.hidden.weight) == bits(model.hidden.weight.to(torch.bfloat16))


def test_exporting_everything_gives_the_training_state(saved: Any, tmp_path: Path) -> None:
    run, model = saved
    out = tmp_path / "all.pt"
    assert as_json("export", run, "30", str(out), "--all")["what"] == "all"
    content = torch.load(out, weights_only=True)
    assert content["step"] == 30
    assert content["progress"] == {"step": 30}
    assert set(content["model"]) == set(model.state_dict())
    assert "exp_avg" in content["optimizer"]["state"]["hidden.weight"]
    assert content["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


def test_export_refuses_damage_and_never_overwrites_by_itself(saved: Any, tmp_path: Path) -> None:
    run, _ = saved
    out = tmp_path / "w.safetensors"
    out.write_text("mine")
    assert call("export", run, "10", str(out)).exit_code == 5
    assert out.read_text() == "mine"
    assert call("export", run, "10", str(out), "--force").exit_code == 0
    _damage(run, 30)
    assert call("export", run, "30", str(tmp_path / "x.pt")).exit_code == 1
    assert sorted(os.listdir(tmp_path)) == ["run", "w.safetensors"], "half a file was left behind"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["ls", "{run}-missing"], 3, "no such run directory"),
        (["show", "{run}", "99"], 3, "no checkpoint of step 99"),
        (["show", "{run}", "newest"], 2, "no step"),
        (["prune", "{run}"], 2, "--keep-"),
        (["export", "{run}", "10", "out.zip"], 2, ".safetensors or .pt"),
        (["export", "{run}", "10", "x.pt", "--component", "nope"], 2, "components are model"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(saved: Any, arguments: list[str], code: int, text: str) -> None:
    result = call(*(part.replace("{run}", saved[0]) for part in arguments))
    assert result.exit_code == code
    assert text in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output


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
