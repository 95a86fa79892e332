"""The journal: what it tells, that it is bounded, that nothing torn is believed, and that no save knows of it."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.branches import state
from support.examples import examples

from asyncckpt import Checkpointer, KeepEvery, KeepLast, Run, RunOptions
from asyncckpt.catalog import journal as journals
from asyncckpt.catalog.journal import KINDS, Journal, JournalEntry, read_journal
from asyncckpt.events import Committed, Failed
from asyncckpt.storage import journal_file
from asyncckpt.storage.journal_file import JOURNAL, JOURNAL_BEFORE, append_line
from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.memory import MemoryStore


def told(path: Path) -> list[tuple[str, int]]:
    return [(entry.what, entry.step) for entry in Run(path).journal()]


def committed(step: int, **more: Any) -> Committed:
    sizes = {"nbytes": 9, "written_bytes": 5, "state_bytes": 9}
    seconds = {"durable_seconds": 0.5, "stall_seconds": 0.25, "commit_seconds": 0.1}
    return Committed(step=step, path=f"/x/step-{step}", **sizes, **seconds, **more)


def test_a_run_leaves_a_line_for_what_happened(tmp_path: Path) -> None:
    path = tmp_path / "run"
    model = torch.nn.Linear(200, 200)
    with Checkpointer(path, keep=[KeepLast(1), KeepEvery(2, weights_only=True)]) as run:
        for step in (1, 2, 3):
            run.save(step, {"model": model}, metrics={"loss": 1 / step, "bad": float("nan")}).result()
    with Checkpointer(path) as run:
        assert run.resume({"model": model}) == 3
    Run(path).restore({"model": model}, 3)
    Run(path).verify()
    assert told(path) == [
        ("save", 1), ("save", 2), ("delete", 1), ("save", 3), ("thin", 2), ("restore", 3), ("restore", 3), ("verify", 3)
    ]  # fmt: skip
    first, second, *_, restored, verified = Run(path).journal()
    assert first.numbers("metrics") == {"loss": 1.0}
    assert first.fields["metrics"]["bad"] == "nan"
    assert (first.name, first.text("kind"), first.pid) == ("step-00000001", "full", os.getpid())
    assert first.fields["environment"]["torch"] == torch.__version__
    assert "environment" not in second.fields
    assert first.number("nbytes") == first.number("written_bytes")
    written = second.number("written_bytes")
    assert written is not None
    assert written < 80_000  # the weights did not change: they were linked
    assert 0 < (first.number("stall_seconds") or 0) < (first.number("durable_seconds") or 0)
    assert time.time() - 60 < first.at_unix_seconds <= verified.at_unix_seconds <= time.time()
    assert restored.number("seconds") is not None
    assert verified.number("damage") == 0


def test_trouble_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Checkpointer(path) as run:
        for step in (1, 2):
            run.save(step, state(step)).result()
        (path / "step-00000002" / "state.json").write_bytes(
            b"x" * (path / "step-00000002" / "state.json").stat().st_size
        )
    with Checkpointer(path) as run, pytest.warns(RuntimeWarning, match="cannot be used"):
        run.resume(state(0))
    assert Run(path).verify(2)
    entries = {entry.what: entry for entry in Run(path).journal()}
    assert entries["fallback"].name == "step-00000002"
    assert "state.json" in entries["fallback"].text("reason")
    assert entries["restore"].step == 1
    assert entries["verify"].number("damage") == 1
    assert "state.json" in entries["verify"].text("first")


def test_a_failed_save_has_a_line(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal(Failed(step=7, error=OSError("no space" + "!" * 5000)))
    journal.close()
    (entry,) = read_journal(LocalStore(str(tmp_path)))
    assert (entry.what, entry.step, entry.text("reason")[:17]) == ("failed", 7, "OSError: no space")
    assert len(entry.text("reason")) == 300


def test_it_is_bounded_and_the_oldest_lines_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_file, "JOURNAL_BYTES", 4000)
    journal = Journal(str(tmp_path))
    for step in range(100):
        journal(committed(step, metrics={"loss": 1.0}))
    journal.close()
    steps = [entry.step for entry in read_journal(LocalStore(str(tmp_path)))]
    assert steps == list(range(steps[0], 100))
    assert 8 < len(steps) < 45
    assert sum((tmp_path / name).stat().st_size for name in (JOURNAL, JOURNAL_BEFORE)) <= 8000
    for step in range(3):  # those who only read begin no new file
        (tmp_path / JOURNAL).write_bytes(b"x" * 3990)
        assert not append_line(str(tmp_path), b"0" * step + b"123456789", create=False)


def test_readers_make_no_journal_and_buckets_have_none(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", run=RunOptions(journal=False)) as run:
        run.save(1, state(1)).result()
    Run(run.path).verify()
    Run(run.path).restore(state(0))
    assert Run(run.path).journal() == []
    assert not (tmp_path / "run" / JOURNAL).exists()
    store = MemoryStore()
    with Checkpointer("memory://none", run=RunOptions(store=store)) as run:
        run.save(1, state(1)).result()
    assert Run("memory://none", store=store).journal() == []


@examples(100)
@given(st.lists(st.binary(max_size=40) | st.sampled_from([b'{"what":"save"', b"[]", b"null", b"{}"]), max_size=8))
def test_what_is_torn_or_forged_is_left_out(tmp_path_factory: pytest.TempPathFactory, rubbish: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("torn")
    for number, line in enumerate(rubbish):
        with (path / JOURNAL).open("ab") as file:
            file.write(line)  # cut off, without its end
        append_line(str(path), json.dumps({"what": "save", "at": 1.5, "step": number}).encode(), create=True)
    found = read_journal(LocalStore(str(path)))
    assert [entry.step for entry in found] == list(range(len(rubbish)))


@pytest.mark.parametrize(
    "body",
    [
        {"what": "save", "at": "now", "step": 1},
        {"what": "save", "at": 1, "step": 1.5},
        {"what": "save", "at": 1, "step": True},
        {"what": "bribe", "at": 1, "step": 1},
        {"what": ["save"], "at": 1, "step": 1},
        {"what": "save", "at": 1, "step": 1, "name": 5},
        {"at": 1, "step": 1},
    ],
)
def test_a_line_of_other_types_is_none(body: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text(json.dumps(body) + '\n{"what":"save","at":NaN,"step":1}\n' + "[" * 20_000)
    assert read_journal(LocalStore(str(tmp_path))) == []


def test_fields_are_what_they_are_taken_for_or_nothing() -> None:
    fields = {"n": 3, "t": True, "x": float("inf"), "s": "text", "m": {"a": 1, "b": "nan", "c": True}, "l": [1]}
    entry = JournalEntry("save", 1.0, 1, fields=fields)
    assert [entry.number(key) for key in ("n", "t", "x", "s", "none")] == [3.0, None, None, None, None]
    assert [entry.text(key) for key in ("s", "n")] == ["text", ""]
    assert [entry.numbers(key) for key in ("m", "l", "s")] == [{"a": 1.0}, {}, {}]


@pytest.mark.parametrize("what", ["a link", "a pipe", "a folder", "read-only"])
def test_where_it_cannot_be_written_saves_go_on(what: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    elsewhere = tmp_path / "elsewhere"
    if what == "a link":
        elsewhere.write_bytes(b"mine\n")
        (path / JOURNAL).symlink_to(elsewhere)
    elif what == "a pipe":
        os.mkfifo(path / JOURNAL)
    elif what == "a folder":
        (path / JOURNAL).mkdir()
    else:
        (path / JOURNAL).touch(0o400)
    with Checkpointer(path) as run:
        run.save(1, state(1)).result()
    assert Run(path).verify() == []
    assert what != "a link" or elsewhere.read_bytes() == b"mine\n"


def test_a_disk_that_hangs_delays_no_save_and_no_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, came = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> bool:
        came.set()
        hangs.wait(30)
        return False

    monkeypatch.setattr(journals, "append_line", hang)
    monkeypatch.setattr(journals, "_CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(journals, "_WAITING", 2)
    with Checkpointer(tmp_path / "run") as run:
        for step in range(1, 7):  # more than may wait
            run.save(step, state(step)).result(20)
        assert came.wait(20)
    assert [entry.step for entry in Run(run.path).ls()] == list(range(1, 7))
    hangs.set()


def test_each_kind_of_line_has_a_name() -> None:
    assert {"save", "ranks", "failed", "restore", "fallback", "delete", "thin", "verify"} == KINDS
