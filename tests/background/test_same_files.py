"""A checkpoint is the same whether a background process or threads of the trainer wrote it."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.background import background_pids
from support.options import by_stage

from asyncckpt import Checkpointer, Delta, InvalidOption, KeepLast, Run, RunOptions, WriterOptions
from asyncckpt.background import choice

FORMATS: list[dict[str, Any]] = [
    {},
    {"codec": "planes"},
    {"codec": "zstd"},
    {"codec": "planes", "delta": Delta(chain=2)},
    {"format": "zarr"},
    {"format": "zarr", "codec": "planes"},
]


def _state(changes: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(changes)
    model = torch.nn.Module()
    model.register_buffer("w", torch.randn(90_000, generator=generator))
    model.register_buffer("short", torch.randn(300, 7, generator=generator).to(torch.bfloat16))
    model.register_buffer("still", torch.arange(70_000))
    return {
        "model": model,
        "more": {"none": torch.zeros(0, 3), "one": torch.tensor(changes)},
        "meta": {"changes": changes, "words": ["a", None, 1.5]},
    }


def _files(path: Path) -> dict[str, str]:
    """Digests of the files of a run that hold bytes of the state; what names an attempt or a time is left out."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file() and file.name not in ("manifest.json", "index.json") and not file.name.startswith(".")
    }


combinations = given(
    kind=st.sampled_from(FORMATS),
    changes=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    weights_only=st.booleans(),
    reuse=st.booleans(),
    read_back=st.booleans(),
    overwrite=st.booleans(),
    asset=st.booleans(),
    name=st.sampled_from(["step-{step:08d}", "at-{step}"]),
    budget=st.sampled_from([None, 1 << 20]),
    in_flight=st.integers(1, 3),
    keep=st.sampled_from([None, 2]),
)


def _both_ways(
    kind: dict[str, Any],
    changes: list[int],
    weights_only: bool,
    reuse: bool,
    read_back: bool,
    overwrite: bool,
    asset: bool,
    name: str,
    budget: int | None,
    in_flight: int,
    keep: int | None,
) -> None:
    options = dict(kind, incremental=reuse or "delta" in kind, read_back=read_back, overwrite=overwrite, name=name)
    options |= {"max_in_flight": in_flight, "extent_bytes": 128 << 10, "shard_bytes": 512 << 10}
    if budget is not None:
        options["staging_bytes"] = budget
    if keep is not None:
        options["keep"] = KeepLast(keep)
    found: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for process in ("always", "never"):
            path = Path(folder) / process
            writer = WriterOptions(process=process)  # type: ignore[arg-type]
            with Checkpointer(path, **by_stage(writer=writer, **options)) as run:
                for step, change in enumerate(changes, 1):
                    more = {"assets": {"notes.txt": b"a note"}} if asset else {}
                    run.save(step, _state(change), weights_only=weights_only, **more)
                run.wait()
                if overwrite:
                    run.save(len(changes), _state(9), weights_only=weights_only).result()
                assert bool(background_pids()) == (process == "always")
            steps = [(entry.step, entry.kind) for entry in Run(path).ls()]
            for step, _ in steps:
                assert Run(path).verify(step) == []
            found.append((steps, _files(path)))
    assert found[0] == found[1]


@settings(max_examples=4)
@combinations
def test_both_ways_write_the_same(**options: Any) -> None:
    _both_ways(**options)


@pytest.mark.slow
@settings(max_examples=80)
@combinations
def test_both_ways_write_the_same_whatever_is_combined(**options: Any) -> None:
    _both_ways(**options)


# -- which of them writes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nbytes", "process"), [(choice.AUTO_BYTES, True), (choice.AUTO_BYTES // 2, False)])
def test_the_size_of_the_state_decides(nbytes: int, process: bool, tmp_path: Path) -> None:
    state = {"w": torch.zeros(nbytes, dtype=torch.uint8)}
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, state).result()
        assert bool(background_pids()) is process
        assert run.verify(1) == []


def test_what_cannot_go_over_takes_threads_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    always = WriterOptions(process="always")
    monkeypatch.setattr(choice, "can_share", lambda: False)
    with Checkpointer(tmp_path / "run", writer=always) as run:
        run.save(1, _state(1)).result()
        run.save(2, _state(2)).result()
        assert not background_pids()
    assert caplog.text.count("no background process") == 1
    assert "shares no memory by descriptor" in caplog.text


def test_a_store_of_the_programs_own_takes_threads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from asyncckpt.storage.memory import MemoryStore

    with Checkpointer("memory", run=RunOptions(store=MemoryStore()), writer=WriterOptions(process="always")) as run:
        run.save(1, _state(1)).result()
        assert not background_pids()
    assert "the storage is no local directory" in caplog.text


def test_a_process_that_cannot_be_started_leaves_the_work_to_threads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "asyncckpt")
    monkeypatch.setattr("sys.executable", "/bin/false")
    with Checkpointer(tmp_path / "run", writer=WriterOptions(process="always")) as run:
        for step in (1, 2):
            run.save(step, _state(step)).result(30)
        assert [entry.step for entry in run.ls()] == [1, 2]
    assert caplog.text.count("threads of the trainer write") == 1


def test_other_choices_are_refused() -> None:
    with pytest.raises(InvalidOption, match="process"):
        WriterOptions(process="sometimes")  # type: ignore[arg-type]
