"""What the host asks a guest to do: saves, readers, rivals. Each function is called by its name, see ``calls.py``.

Paths are of the guest; what is returned is JSON. An assertion that fails here fails the test on the host.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import serve
from scenarios import SCENARIOS, check_visible, fork, generation_in, leftovers, state_of
from test_kills import Trainers
from typer.testing import CliRunner

from asyncckpt import (
    AsyncCkptError,
    Checkpointer,
    CheckpointNotFound,
    KeepLast,
    LeaseOptions,
    Run,
    RunLocked,
    SaveFailed,
    WriterOptions,
)
from asyncckpt.cli.app import app

CALLS: dict[str, Callable[..., Any]] = {}
SHARE = Path("/run/share")


def call(function: Callable[..., Any]) -> Callable[..., Any]:
    CALLS[function.__name__] = function
    return function


@call
def ready() -> str:
    """Everything is imported."""
    return torch.__version__


@call
def round_trip(path: str, scenario: str) -> dict[str, Any]:
    """Four generations, and all of what retention leaves restored; what the last save wrote."""
    with SCENARIOS[scenario].checkpointer(Path(path)) as run:
        for generation in (1, 2, 3, 4):
            report = run.save(generation, state_of(generation)).result()
    assert not leftovers(Path(path))
    return {
        "visible": check_visible(Path(path)),
        "nbytes": report.nbytes,
        "written_bytes": report.written_bytes,
        "latest": Path(path, "latest").read_text().strip(),
    }


@call
def refuse_to_replace(path: str) -> str:
    """What ``overwrite=True`` says of a step that is there; the one that is there must stay."""
    with SCENARIOS["overwrite"].checkpointer(Path(path)) as run:
        run.save(7, state_of(1)).result()
        with pytest.raises(SaveFailed) as raised:
            run.save(7, state_of(2)).result()
        assert check_visible(Path(path)) == {7: 1}
        run.save(8, state_of(3)).result()
    assert check_visible(Path(path)) == {7: 1, 8: 3}
    assert not leftovers(Path(path))
    return str(raised.value)


@call
def doctor(path: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["doctor", path, "--json", "--seconds", "0"])
    return {"exit_code": done.exit_code, **json.loads(done.stdout)}


_children: dict[str, int] = {}


@call
def hold(path: str) -> int:
    """Another process becomes the run of this directory, and saves once; its pid."""

    def live(pipe: int) -> None:
        with Checkpointer(path) as run:
            run.save(1, state_of(1)).result()
            os.write(pipe, b"held")
            time.sleep(3600)

    pid, pipe = fork(live)
    with os.fdopen(pipe, "rb", buffering=0) as held:
        if held.read(4) != b"held":
            raise AssertionError(f"could not become the run of the directory: {os.waitpid(pid, 0)[1]}")
    _children[path] = pid
    return pid


@call
def let_die(path: str) -> None:
    pid = _children.pop(path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@call
def try_to_save(path: str, step: int, ttl_seconds: float = 20.0) -> dict[str, Any]:
    """As another run: what it is told, and after how long."""
    began = time.monotonic()
    lease = LeaseOptions(beat_seconds=min(5.0, ttl_seconds / 4), ttl_seconds=ttl_seconds)
    try:
        with Checkpointer(path, lease=lease) as run:
            run.save(step, state_of(step)).result()
        refused = ""
    except RunLocked as error:
        refused = str(error)
    return {"refused": refused, "seconds": time.monotonic() - began}


@call
def delete_while_open(path: str) -> dict[str, Any]:
    """Retention deletes a checkpoint of which somebody, who takes no lock, has a file open."""
    folder = Path(path)
    with SCENARIOS["retention"].checkpointer(folder) as run:
        run.save(1, state_of(1)).result()
        file = next((folder / name).resolve() for name in sorted(folder.rglob("*.safetensors")))
        with file.open("rb") as held:
            run.save(2, state_of(2)).result()
            run.wait()
            renamed = [entry.name for entry in folder.rglob(".nfs*")]
            assert check_visible(folder) == {2: 2}
            run.save(3, state_of(3)).result()
            run.wait()
            assert check_visible(folder) == {3: 3}
            held.read()
        left = leftovers(folder)
    with SCENARIOS["retention"].checkpointer(folder) as run:
        run.save(4, state_of(4)).result()
    assert check_visible(folder) == {4: 4}
    return {"renamed": renamed, "left": left, "left_after_the_next_run": leftovers(folder)}


@call
def delete_while_read(path: str, reader_path: str) -> list[int]:
    """Retention meets a checkpoint that a reader holds by its lock: what is there while, and after it is read."""
    with SCENARIOS["retention"].checkpointer(Path(path)) as run:
        run.save(1, state_of(1)).result()
        reader = Run(reader_path)._store.open(run.ls()[0].path.rpartition("/")[2])
        try:
            run.save(2, state_of(2)).result()
            run.wait()
            return sorted(entry.step for entry in run.ls())
        finally:
            reader.close()


@call
def kills(path: str, number: int, seed: str) -> dict[str, int]:
    """Trainers that die at random moments, one after the other, in a directory for each scenario."""
    os.mkdir(path)
    rng = random.Random(seed)
    runs = [Trainers(Path(path, name), SCENARIOS[name]) for name in SCENARIOS if name != "overwrite"]
    for _ in range(number):
        rng.choice(runs).at_random(rng, within_seconds=5.0)
    return {
        "deaths": sum(run.deaths for run in runs),
        "in_flight": sum(run.in_flight for run in runs),
        "saves": sum(run.newest for run in runs),
    }


@call
def start_trainer(path: str, scenario: str, newest: int, acks: str) -> None:
    """Saves one generation after the other, from the one after ``newest``, until stopped. Each that is acknowledged
    is a file in the folder ``acks`` of the host: known there whatever becomes of this machine."""

    def train(pipe: int) -> None:
        def tell(done: Any, generation: int) -> None:
            if not done.failed():
                (SHARE / acks / str(generation)).touch()

        with SCENARIOS[scenario].checkpointer(Path(path)) as run:
            for generation in range(newest + 1, newest + 10_000):
                pending = run.save(generation, state_of(generation))
                pending.add_done_callback(lambda done, g=generation: tell(done, g))
                pending.result()

    pid, pipe = fork(train)
    os.close(pipe)
    _children["trainer"] = pid


@call
def kill_trainer() -> None:
    os.kill(_children["trainer"], signal.SIGKILL)


@call
def bury_trainer() -> bool:
    """Whether it was alive when it was killed. Blocks for as long as the kernel, which closes its files, waits for the
    server."""
    return os.WIFSIGNALED(os.waitpid(_children.pop("trainer"), 0)[1])


@call
def visible(path: str) -> dict[int, int]:
    """All that is visible, verified and restored: the generation of each step."""
    return check_visible(Path(path))


class _Training:
    """A training loop in a thread: steps that take a hundredth of a second, a save at each where none is in flight."""

    def __init__(self, path: str, durable_timeout_seconds: float, stall_timeout_seconds: float, keep: int) -> None:
        self.saved: list[int] = []
        self.errors: list[str] = []
        self.untyped: list[str] = []
        self.longest_seconds = 0.0
        self.steps = 0
        self._path = path
        self._writer = WriterOptions(
            threads=2,
            durable_timeout_seconds=durable_timeout_seconds,
            stall_timeout_seconds=stall_timeout_seconds,
        )
        self._keep = KeepLast(keep)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def _train(self) -> None:
        run = SCENARIOS["links"].checkpointer(Path(self._path), writer=self._writer, keep=self._keep, every=1)
        run.prepare(state_of(0))
        while not self._stop.is_set():
            self.steps += 1
            began = time.monotonic()
            try:
                run.step(self.steps, state_of(self.steps))
            except AsyncCkptError as error:
                self.errors.append(f"{type(error).__name__}: {error}")
            except BaseException as error:
                self.untyped.append(repr(error))
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
            time.sleep(0.01)
        with contextlib.suppress(AsyncCkptError):
            run.close()

    def end(self) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "training does not come to its end"


_training: list[_Training] = []


@call
def start_training(
    path: str, durable_timeout_seconds: float = 3600.0, stall_timeout_seconds: float = 600.0, keep: int = 2
) -> None:
    _training.append(_Training(path, durable_timeout_seconds, stall_timeout_seconds, keep))


@call
def training(*, end: bool = False) -> dict[str, Any]:
    """How it goes."""
    now = _training[-1]
    if end:
        _training.pop().end()
    return {
        "steps": now.steps,
        "errors": now.errors,
        "untyped": now.untyped,
        "longest_seconds": now.longest_seconds,
    }


@call
def watch(path: str, seconds: float) -> dict[str, Any]:
    """Read the newest checkpoint of somebody else's run, again and again, as it changes and goes."""
    seen: list[int] = []
    gone = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        run = Run(path)
        for entry in run.ls():
            assert entry.damage is None, f"half of a checkpoint is visible: {entry}"
        try:
            seen.append(generation_in(run, None))
        except CheckpointNotFound:
            gone += 1
    assert seen == sorted(seen), f"the newest became an older one: {seen}"
    return {"reads": len(seen), "different": len(set(seen)), "gone": gone}


if __name__ == "__main__":
    faulthandler.enable()
    serve(SHARE / sys.argv[1] / "python", CALLS)
