"""The demo from end to end, shortened, and what it does to a directory that is not its own."""

from __future__ import annotations

import importlib.util
import json
import platform
import signal
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from support.scripts import Script

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from asyncckpt import Checkpointer, InvalidOption, MissingExtra, Run, RunPathError, demo
from asyncckpt.demo import child
from asyncckpt.demo.compare import compare
from asyncckpt.demo.data import TextLoader, collect
from asyncckpt.demo.training import Training


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    collect(tmp_path / "corpus.txt")
    return tmp_path / "corpus.txt"


class _Forked(Script):
    """Stands in for ``subprocess.Popen([python, "-m", module, ...])`` without the interpreter's start."""

    def __init__(self, command: list[str], *, stderr: BinaryIO, **_: int) -> None:
        module, *arguments = command[command.index("-m") + 1 :]
        super().__init__(f"import runpy; runpy.run_module({module!r}, run_name='__main__')", *arguments)
        self._log = stderr

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __exit__(self, *_: object) -> None:
        self.finish()
        self._log.write(self.errors.encode())


@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["forked", "started"])
def test_killed_and_resumed_it_ends_bit_equal(
    forked: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if forked:
        platform.platform()  # starts a process of its own, once
        monkeypatch.setattr(child.subprocess, "Popen", _Forked)
    out = tmp_path / "demo"
    assert demo.run(out, steps=12, rounds=1) == 0
    shown = capsys.readouterr().out
    assert "BIT-EQUAL" in shown
    assert "killed (exit code -9)" in shown
    assert "left behind, invisible to every reader: .tmp-" in shown
    assert "torch.save + fsync" in shown
    assert "asyncckpt verify" in shown
    png = (out / "timeline.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(png) > 20_000
    stages = {event.get("cat") for event in json.loads((out / "trace.json").read_text())["traceEvents"]}
    assert {"training", "stall", "staging", "writing", "commit", "restore"} <= stages
    assert [entry.step for entry in Run(out / "interrupted").ls()][-1] == 12
    assert Run(out / "interrupted").verify() == []


def test_a_value_that_differs_is_found_and_named(tmp_path: Path, corpus: Path) -> None:
    for name, seed in (("one", 1), ("other", 1), ("third", 2)):
        training = Training(corpus, seed=seed, total_steps=10)
        if name == "other":
            training.losses.values.append(0.5)
            training.model.norm.bias.data[0] = -0.0  # equal to 0.0, and another bit
        with Checkpointer(tmp_path / name) as checkpointer:
            checkpointer.save(1, training.state)
    different = {c.component: c.different for c in compare(tmp_path / "one", tmp_path / "other", 1, corpus, 10)}
    assert {name: names for name, names in different.items() if names} == {
        "model": ("norm.bias",),
        "losses": ("values[0]",),
    }
    different = {c.component: c.different for c in compare(tmp_path / "one", tmp_path / "third", 1, corpus, 10)}
    assert all(different[name] for name in ("model", "loader", "rng"))


def test_the_loader_goes_on_inside_an_epoch_and_into_the_next(corpus: Path) -> None:
    size = corpus.stat().st_size
    loader = TextLoader(corpus, batch=4, context=size // 10, seed=1)  # about two batches an epoch
    batches = iter(loader)
    seen: list[Any] = [next(batches) for _ in range(3)]
    assert loader.epoch == 1
    state = loader.state_dict()
    seen += [next(batches) for _ in range(3)]
    resumed = TextLoader(corpus, batch=4, context=size // 10, seed=9)
    resumed.load_state_dict(state)
    for (inputs, targets), (again, targets_again) in zip(seen[3:], iter(resumed), strict=False):
        assert inputs.equal(again)
        assert targets.equal(targets_again)
    assert not seen[0][0].equal(seen[2][0])


def test_files_the_demo_did_not_make_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunPathError, match=r"thesis\.tex"):
        demo.run(tmp_path)
    (tmp_path / ".asyncckpt-demo").touch()  # even beside what an earlier demo left
    (tmp_path / "trace.json").write_text("{}")
    with pytest.raises(RunPathError, match=r"thesis\.tex"):
        demo.run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".asyncckpt-demo", "thesis.tex", "trace.json"]


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunPathError, match="--out"):
        demo.run(tmp_path / "file")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(MissingExtra, match=r"matplotlib: pip install 'asyncckpt\[demo\]'"):
        demo.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"steps": 5}, {"steps": 12.0}, {"rounds": 0}])
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption):
        demo.run(tmp_path / "out", **options)
