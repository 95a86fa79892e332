"""What the host asks a guest to do: saves, readers, rivals. Each function is called by its name, see ``calls.py``.

Paths are of the guest; what is returned is JSON. An assertion that fails here fails the test on the host.

This process forks and never has a second thread: whatever has some is a child. In User-Mode Linux a fork of a process
whose threads have ended crashes when it starts its own.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import serve
from support.scenarios import SCENARIOS, check_visible, fork, generation_in, leftovers, state_of
from test_kills import Trainers
from typer.testing import CliRunner

from asyncckpt import (
    AsyncCkptError,
    Checkpointer,
    CheckpointNotFound,
    LeaseOptions,
    Run,
    RunLocked,
    RunOptions,
    SaveFailed,
)
from asyncckpt.cli.app import app

CALLS: dict[str, Callable[..., Any]] = {}
SHARE = Path("/run/share")


def call(function: Callable[..., Any]) -> Callable[..., Any]:
    CALLS[function.__name__] = function
    return function


def call_apart(function: Callable[..., Any]) -> Callable[..., Any]:
    CALLS[function.__name__] = lambda **arguments: apart(lambda: function(**arguments))
    return function


def apart(function: Callable[[], Any]) -> Any:
    """What the function returns, through JSON, called in a child."""

    def answer(pipe: int) -> None:
        try:
            body = {"value": function()}
        except BaseException:
            body = {"error": traceback.format_exc()}
        with os.fdopen(pipe, "w") as file:
            json.dump(body, file)

    pid, read_end = fork(answer)
    with os.fdopen(read_end) as file:
        text = file.read()
    status = os.waitpid(pid, 0)[1]
    if not text:
        raise AssertionError(f"a child died, status {status}")
    body = json.loads(text)
    if "error" in body:
        raise AssertionError(body["error"])
    return body["value"]


@call
def ready() -> str:
    """Everything is imported."""
    return str(torch.__version__)


@call_apart
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


@call_apart
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


@call_apart
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


@call_apart
def try_to_save(path: str, step: int, ttl_seconds: float = 20.0) -> dict[str, Any]:
    """As another run: what it is told, and after how long."""
    began = time.monotonic()
    lease = LeaseOptions(beat_seconds=min(5.0, ttl_seconds / 4), ttl_seconds=ttl_seconds)
    try:
        with Checkpointer(path, run=RunOptions(lease=lease)) as run:
            run.save(step, state_of(step)).result()
        refused = ""
    except RunLocked as error:
        refused = str(error)
    return {"refused": refused, "seconds": time.monotonic() - began}


@call_apart
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


@call_apart
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


class _Trainers(Trainers):
    def _check(self, durable: int) -> None:
        visible = apart(lambda: check_visible(self.path))
        self.newest = max(visible.values(), default=0)
        assert self.newest >= durable, f"generation {durable} was acknowledged, {self.newest} is the newest left"


@call
def kills(path: str, number: int, seed: str) -> dict[str, int]:
    """Trainers that die at random moments, one after the other, in a directory for each scenario."""
    os.mkdir(path)
    rng = random.Random(seed)
    runs = [_Trainers(Path(path, name), SCENARIOS[name]) for name in SCENARIOS if name != "overwrite"]
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


@call_apart
def visible(path: str) -> dict[int, int]:
    """All that is visible, verified and restored: the generation of each step."""
    return check_visible(Path(path))


def _train(path: str, options: dict[str, float], told: Path) -> None:
    """A training loop: steps that take a hundredth of a second, a save at each. How it goes is in the file ``told``;
    ends once there is a file ``end`` beside it."""
    run = SCENARIOS["links"].checkpointer(Path(path), every=1, **options)
    state: dict[str, Any] = {"steps": 0, "errors": [], "untyped": [], "longest_seconds": 0.0, "ended": False}

    def tell() -> None:
        told.with_suffix(".part").write_text(json.dumps(state))
        told.with_suffix(".part").rename(told)

    while not told.with_name("end").exists():
        tell()
        began = time.monotonic()
        try:
            if not state["steps"]:
                run.prepare(state_of(0))
            run.step(state["steps"] + 1, state_of(state["steps"] + 1))
        except AsyncCkptError as error:
            state["errors"].append(f"{type(error).__name__}: {error}")
        except BaseException as error:
            state["untyped"].append(repr(error))
        state["steps"] += 1
        state["longest_seconds"] = max(state["longest_seconds"], time.monotonic() - began)
        time.sleep(0.01)
    try:
        run.close()
    except AsyncCkptError as error:
        state["errors"].append(f"{type(error).__name__}: {error}")
    state["ended"] = True
    tell()


_TOLD = Path("/run/tmp/training/told")


@call
def start_training(path: str, options: dict[str, float]) -> None:
    """``options``: of the checkpointer, by name."""
    shutil.rmtree(_TOLD.parent, ignore_errors=True)
    _TOLD.parent.mkdir()
    pid, pipe = fork(lambda _pipe: _train(path, options, _TOLD))
    os.close(pipe)
    _children["training"] = pid


@call
def training(*, end: bool = False) -> dict[str, Any]:
    """How it goes, or went."""
    if end:
        _TOLD.with_name("end").touch()
        os.waitpid(_children.pop("training"), 0)
    told = json.loads(_TOLD.read_text()) if _TOLD.exists() else {"steps": 0, "errors": []}
    assert not end or told["ended"], f"training died: {told}"
    return told


@call_apart
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
