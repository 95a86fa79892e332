"""The command on directories that are moving, locked, or not to be trusted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.scripts import Script
from typer.testing import CliRunner

from asyncckpt import Checkpointer, Run
from asyncckpt import run as reading
from asyncckpt.catalog.listing import CheckpointInfo, Listing
from asyncckpt.cli.app import app
from asyncckpt.protocols import Reader

_HOLD = """
import sys, torch
from asyncckpt import Checkpointer
with Checkpointer(sys.argv[1]) as run:
    run.prepare({"w": torch.zeros(4)})
    print("held", flush=True)
    sys.stdin.read()
"""
_CHURN = """
import sys, threading, torch
from asyncckpt import Checkpointer, KeepLast
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
with Checkpointer(sys.argv[1], keep=KeepLast(1)) as run:
    step = 100
    while not stop.is_set():
        step += 1
        run.save(step, {"w": torch.full((1000,), step)}).result()
        if step == 101:
            print("going", flush=True)
"""


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def steps(run: str) -> list[tuple[int, str]]:
    return [(entry.step, entry.kind) for entry in Run(run).ls()]


@pytest.fixture
def saved(tmp_path: Path) -> str:
    with Checkpointer(tmp_path / "run") as run:
        for step in (10, 20, 30):
            run.save(step, {"w": torch.full((1000,), step)}, metrics={"loss": 1.0 / step}).result()
    return str(tmp_path / "run")


@pytest.fixture
def other_process(saved: str) -> Iterator[Any]:
    running: list[Script] = []
    with contextlib.ExitStack() as started:

        def start(script: str) -> int:
            process = started.enter_context(Script(script, saved))
            assert process.stdout.readline().strip()
            running.append(process)
            return process.pid

        yield start
        for process in running:
            status, _, errors = process.finish()
            assert status == 0, errors


def test_prune_deletes_nothing_from_a_run_another_process_holds(saved: str, other_process: Any) -> None:
    pid = other_process(_HOLD)
    result = call("prune", saved, "--keep-last", "1")
    assert result.exit_code == 4
    assert f"pid {pid}" in result.stderr
    assert [step for step, _ in steps(saved)] == [10, 20, 30]
    assert call("prune", saved, "--keep-last", "1", "--dry-run").exit_code == 0
    assert call("pin", saved, "10").exit_code == 0


def test_reading_verbs_never_fail_on_a_run_whose_checkpoints_come_and_go(saved: str, other_process: Any) -> None:
    other_process(_CHURN)
    first = json.loads(call("ls", saved, "--json").stdout)[-1]["step"]
    for _ in range(15):
        for arguments in (["ls", saved], ["show", saved], ["verify", saved], ["verify", saved, "--all"]):
            result = call(*arguments)
            assert result.exit_code == 0, (arguments, result.output)
            assert "damaged" not in result.output
        assert call("diff", saved, "latest", "latest").exit_code in (0, 1)
        assert result.stderr == "" or "error" not in result.stderr
    assert json.loads(call("ls", saved, "--json").stdout)[-1]["step"] > first, "the run stood still"


def _vanishing(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Somebody deletes this checkpoint between the listing and the reading, and asks no lock."""

    def vanishing(original: Any) -> Any:
        def vanish(listing_or_run: Any, entry: CheckpointInfo, **options: Any) -> Any:
            if entry.step == step:
                shutil.rmtree(entry.path, ignore_errors=True)
            return original(listing_or_run, entry, **options)

        return vanish

    monkeypatch.setattr(Listing, "open", vanishing(Listing.open))
    monkeypatch.setattr(Run, "verify_entry", vanishing(Run.verify_entry))


@pytest.mark.parametrize("verb", ["show", "verify", "export"])
def test_latest_that_vanishes_is_looked_for_again(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    _vanishing(monkeypatch, 30)
    more = ["latest", str(tmp_path / "w.pt"), "--all"] if verb == "export" else []
    result = call(verb, saved, *more, "--json")
    assert result.exit_code == 0, result.output
    parsed = json.loads(result.stdout)
    assert (parsed[0] if verb == "verify" else parsed)["step"] == 20


@pytest.mark.parametrize("verb", ["show", "verify"])
def test_a_step_that_vanishes_is_not_found_rather_than_damaged_or_good(
    saved: str, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    _vanishing(monkeypatch, 10)
    result = call(verb, saved, "10")
    assert result.exit_code == 3, result.output
    assert "10" in result.stderr


@pytest.mark.parametrize(("arguments", "code"), [(["10"], 3), (["--all"], 0)])
def test_a_checkpoint_deleted_under_an_open_reader_is_not_called_damaged(
    saved: str, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int
) -> None:
    verify = reading.verify

    def lose(reader: Reader, **options: Any) -> Any:
        if reader.name == "step-00000010":
            shutil.rmtree(reader.path)
        return verify(reader, **options)

    monkeypatch.setattr(reading, "verify", lose)
    result = call("verify", saved, *arguments)
    assert result.exit_code == code, result.output
    assert "damaged" not in result.output


def test_a_checkpoint_deleted_while_it_is_read_is_skipped_not_called_damaged(
    saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = Run.ls

    def ls(run: Run) -> list[CheckpointInfo]:
        gone = CheckpointInfo(step=5, name="step-5", path=f"{run.path}/step-5", damage="manifest.json is missing")
        return [gone, *listing(run)]

    monkeypatch.setattr(Run, "ls", ls)
    assert [entry["step"] for entry in json.loads(call("ls", saved, "--json").stdout)] == [10, 20, 30]
    assert call("verify", saved, "--all").exit_code == 0


def test_prune_keeps_what_it_verified_even_where_a_newer_checkpoint_appears(
    saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_entry = Run.verify_entry

    def verify_while_another_run_saves(run: Run, entry: CheckpointInfo, **options: Any) -> Any:
        with Checkpointer(saved) as other:
            other.save(40, {"w": torch.ones(4)}).result()
        return verify_entry(run, entry, **options)

    monkeypatch.setattr(Run, "verify_entry", verify_while_another_run_saves)
    assert call("prune", saved, "--keep-last", "1").exit_code == 0
    assert [step for step, _ in steps(saved)] == [30, 40], "only a checkpoint that nobody verified was left"


def test_prune_verifies_the_training_state_not_the_newer_weights(saved: str) -> None:
    model = torch.nn.Linear(4, 4)
    with Checkpointer(saved) as run:
        run.save(40, {"model": model}, weights_only=True).result()
    shard = next(Path(saved, "step-00000030").glob("w-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = call("prune", saved, "--keep-last", "1")
    assert result.exit_code == 1
    assert "step-00000030" in result.stderr
    assert len(steps(saved)) == 4


@pytest.mark.parametrize("how", [[], ["--dry-run"]])
def test_prune_refuses_to_empty_a_run_of_weights(tmp_path: Path, how: list[str]) -> None:
    path = str(tmp_path / "run")
    with Checkpointer(path) as run:
        for step in (1, 2, 3):
            run.save(step, {"model": torch.nn.Linear(2, 2)}, weights_only=True).result()
    result = call("prune", path, "--keep-every", "7", *how)
    assert result.exit_code == 2
    assert "keep none" in result.stderr
    assert len(steps(path)) == 3


def test_prune_says_what_it_kept_because_somebody_reads_it(saved: str) -> None:
    reader = Run(saved).open(10)
    result = json.loads(call("prune", saved, "--keep-last", "1", "--json").stdout)
    reader.close()
    assert [entry["step"] for entry in result["deleted"]] == [20]
    assert [entry["step"] for entry in result["in_use"]] == [10]


def test_verify_of_a_step_covers_its_weights_only_checkpoint_too(saved: str) -> None:
    with Checkpointer(saved) as run:
        run.save(30, {"model": torch.nn.Linear(2, 2)}, weights_only=True).result()
    shard = next(Path(saved, "weights-step-00000030").glob("model-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert call("verify", saved, "30").exit_code == 1


def test_names_are_text_not_markup_nor_terminal_commands(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    with Checkpointer(path, config={"note": "[/red] :warning:"}) as run:
        run.save(1, {"w": torch.ones(1)}, metrics={"loss[/bold]": 1.0}).result()
        run.save(2, {"w": torch.ones(1)}).result()
    Path(path, "step-00000002", "\x1b[2J[bold].txt").write_text("planted")
    for arguments in (["ls", path], ["show", path, "1", "--tensors"], ["verify", path], ["verify", path, "--all"]):
        result = call(*arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit), arguments
        assert "\x1b[2J" not in result.output
    assert "loss[/bold]=1" in call("ls", path).stdout
    assert "[/red] :warning:" in call("show", path, "1").stdout
    assert "[bold].txt" in call("verify", path, "2").stdout


def test_a_pipe_that_closes_early_is_no_error(saved: str) -> None:
    script = f"'{sys.executable}' -c 'from asyncckpt.cli import main; main()' ls '{saved}' --json | true"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr
