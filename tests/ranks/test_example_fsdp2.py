"""``examples/pretrain_fsdp2.py`` outlives its ranks: one is killed in a save, and it goes on, on fewer or as many."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.harness import Crews
from support.scripts import Script

from asyncckpt import Run

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_fsdp2.py"
STEPS, EVERY = 30, 6
#: Enough for a save to be seen while it is made, little enough for four ranks on two cores.
OPTIONS = ["--steps", STEPS, "--every", EVERY, "--width", 132, "--layers", 1, "--batch", 8, "--rank-timeout", 3]
#: The order in which ranks' gradients are added up differs with their number; what is saved does not.
ALIKE = 2e-4
_PATIENCE_SECONDS = 180.0


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **more}


def _start(out: Path, ranks: int) -> list[Script]:
    """The ranks as torchrun starts them, but without it: nobody ends the others when one dies."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    return [
        Script(
            SCRIPT,
            "--out",
            out,
            *OPTIONS,
            env=_environment(**job, RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0"),
            joined=True,
        )
        for rank in range(ranks)
    ]


def _finished(job: list[Script]) -> list[tuple[int, str]]:
    """Exit status and output of each rank; it is killed where it does not end."""
    return [process.finish(_PATIENCE_SECONDS)[:2] for process in job]


def _trained(out: Path, ranks: int) -> str:
    """Rank 0's output of a job that has to succeed."""
    found = _finished(_start(out, ranks))
    assert [status for status, _ in found] == [0] * ranks, "\n".join(shown for _, shown in found)
    return found[0][1]


def _losses(shown: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", shown)}


def _steps(out: Path) -> list[int]:
    return [entry.step for entry in Run(out).ls() if entry.damage is None] if out.exists() else []


def _attempts(out: Path) -> list[str]:
    return [name for name in os.listdir(out) if name.startswith(".tmp-0")] if out.exists() else []


def _kill_in_a_save(out: Path, victim: Script, after: int) -> int:
    """SIGKILL it while a checkpoint later than ``after`` is written; the newest step that was published by then."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        steps = _steps(out)
        if steps and steps[-1] >= after and _attempts(out):
            victim.send_signal(signal.SIGKILL)
            return steps[-1]
        time.sleep(0.0005)
    raise AssertionError("there was no save to kill a rank in")


@pytest.fixture(scope="module")
def reference(crews: Crews, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a job of four ranks that nothing happens to."""
    crews.leave_room(4)
    losses = _losses(_trained(tmp_path_factory.mktemp("whole") / "run", 4))
    assert list(losses) == list(range(1, STEPS + 1))
    return losses


def test_a_rank_killed_in_a_save_and_the_rest_of_the_training_on_two(
    reference: dict[int, float], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = _start(out, 4)
    published = _kill_in_a_save(out, job[3], after=2 * EVERY)
    before = _finished(job)
    assert before[3][0] == -signal.SIGKILL
    for rank, (status, shown) in enumerate(before[:3]):
        assert status > 0, f"rank {rank} has not noticed: {shown}"
    done = _losses(before[0][1])
    assert done == {step: loss for step, loss in reference.items() if step in done}, "four ranks do not count alike"

    durable = _steps(out)[-1]
    assert durable >= published, "a checkpoint that was there is gone"
    shown = _trained(out, 2)
    assert f"2 ranks, starting after step {durable}" in shown
    assert _attempts(out) == [], "the next job tidies up"
    after = _losses(shown)
    assert list(after) == list(range(durable + 1, STEPS + 1))
    assert after == pytest.approx({step: reference[step] for step in after}, rel=ALIKE)
    whole = [float(line) for line in Path(f"{out}-losses.txt").read_text().split()]
    assert whole == pytest.approx(list(reference.values()), rel=ALIKE), "the history, over both jobs"


@contextlib.contextmanager
def _torchrun(out: Path, log: Path, ranks: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["--max-restarts=2", "--monitor-interval=0.2", str(SCRIPT), "--out", str(out), *map(str, OPTIONS)]
    with (
        open(log, "wb") as file,
        subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=_environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        ) as agent,
    ):
        try:
            yield agent
        finally:
            agent.terminate()


def _ranks_of(agent: subprocess.Popen[bytes]) -> dict[int, int]:
    """Rank → pid, of the processes that torchrun has started."""
    found: dict[int, int] = {}
    for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(one[5:]): int(pid) for one in variables if one.startswith(b"RANK=")}
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_torchrun_starts_the_job_again_and_it_ends_as_if_nothing_had_been(
    reference: dict[int, float], tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    with _torchrun(out, log, 4) as agent:
        for rank, after in ((2, EVERY), (0, 3 * EVERY)):
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not (_steps(out) and _steps(out)[-1] >= after and _attempts(out)):
                assert time.monotonic() < deadline, log.read_text()
                assert agent.poll() is None, log.read_text()
                time.sleep(0.0005)
            os.kill(_ranks_of(agent)[rank], signal.SIGKILL)
        assert agent.wait(_PATIENCE_SECONDS) == 0, log.read_text()
    assert log.read_text().count("4 ranks, starting after step") == 3
    whole = [float(line) for line in Path(f"{out}-losses.txt").read_text().split()]
    assert [round(loss, 6) for loss in whole] == list(reference.values()), "bit by bit: the same ranks, the same order"
