"""The recipes of docs/trainers/launchers.md: agents that start workers again, and schedulers that send signals."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import asyncckpt

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parent / "elastic_training.py"
_PATIENCE_SECONDS = 120.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _agent(out: Path, port: int, nodes: str, seconds: float, *, hosts: bool = True) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc-per-node=1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=job", "--local-addr=127.0.0.1"]
    patience = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=10,join_timeout=120"
    command += [
        "--rdzv-conf",
        f"{patience},is_host={int(hosts)}",
        "--max-restarts=3",
    ]  # who hosts the store has to live
    command += ["--monitor-interval=0.2", str(SCRIPT), str(out), str(seconds)]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (out / f"agent-{time.monotonic_ns()}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


@contextlib.contextmanager
def _ended(*agents: subprocess.Popen[bytes]) -> Iterator[None]:
    """End the agents, and all that they have started, after the body."""
    try:
        yield
    finally:
        for agent in agents:
            _kill(agent)


def _kill(agent: subprocess.Popen[bytes]) -> None:
    """Kill an agent and its workers, which have sessions of their own, as when a machine is lost."""
    with contextlib.suppress(FileNotFoundError):
        workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        agent.kill()
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(worker), signal.SIGKILL)
    agent.wait()


def _wait(what: str, is_so: Callable[[], bool], out: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not is_so():
        logs = "".join(one.read_text(errors="replace")[-3000:] for one in out.glob("agent-*.log"))
        assert time.monotonic() < deadline, f"{what}: not within {_PATIENCE_SECONDS} s\n{logs}"
        time.sleep(0.2)


def _starts(out: Path) -> list[tuple[int, int]]:
    """List how many ranks each start had, and the step that it went on from."""
    path = out / "starts.txt"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines]


def _newest(out: Path) -> int:
    entries = asyncckpt.Run(out / "run").ls() if (out / "run").is_dir() else []
    return max((one.step for one in entries), default=0)


def _unbroken(folder: Path) -> str:
    folder.mkdir()
    agent = _agent(folder, _free_port(), "1", 0.0)
    with _ended(agent):
        assert agent.wait(_PATIENCE_SECONDS) == 0
    return (folder / "end.txt").read_text()


def test_agent_starts_workers_again_with_another_number_of_them(tmp_path: Path) -> None:
    expected = _unbroken(tmp_path / "unbroken")
    port = _free_port()
    first = _agent(tmp_path, port, "1:2", 0.4)
    with _ended(first):
        second = _agent(tmp_path, port, "1:2", 0.4, hosts=False)
        with _ended(second):
            _wait("two ranks", lambda: any(ranks == 2 for ranks, _ in _starts(tmp_path)), tmp_path)
            begun = len(_starts(tmp_path))
            reached = _newest(tmp_path)
            _wait("a checkpoint of two", lambda: _newest(tmp_path) > reached, tmp_path)
        _wait("one rank alone", lambda: len(_starts(tmp_path)) > begun, tmp_path)
        assert _starts(tmp_path)[-1][0] == 1
        assert _starts(tmp_path)[-1][1] > reached
        assert first.wait(_PATIENCE_SECONDS) == 0
    assert (tmp_path / "end.txt").read_text() == expected


def test_agents_that_join_later_and_again_make_more_ranks_of_it(tmp_path: Path) -> None:
    """One rank, then two, then one, then two again."""
    expected = _unbroken(tmp_path / "unbroken")
    port = _free_port()

    def may_reach(step: int) -> None:
        (tmp_path / "most.new").write_text(str(step))
        (tmp_path / "most.new").replace(tmp_path / "most.txt")

    def train(ranks: int, step: int) -> None:
        """Wait until there are so many ranks, and then until they have reached the step."""
        _wait(f"{ranks} ranks", lambda: bool(_starts(tmp_path)) and _starts(tmp_path)[-1][0] == ranks, tmp_path)
        may_reach(step)
        _wait(f"step {step}", lambda: _newest(tmp_path) >= step, tmp_path)

    may_reach(0)
    first = _agent(tmp_path, port, "1:2", 0.0)
    with _ended(first):
        train(1, 10)
        second = _agent(tmp_path, port, "1:2", 0.0, hosts=False)
        with _ended(second):
            train(2, 20)
        may_reach(30)  # the rank that is left learns in its next step that it is alone
        train(1, 30)
        third = _agent(tmp_path, port, "1:2", 0.0, hosts=False)
        with _ended(third):
            train(2, 40)
            (tmp_path / "most.txt").unlink()
            assert first.wait(_PATIENCE_SECONDS) == 0
            assert third.wait(_PATIENCE_SECONDS) == 0
    starts = _starts(tmp_path)
    assert [ranks for ranks, _ in itertools.groupby(starts, key=lambda start: start[0])] == [1, 2, 1, 2]
    assert [step for _, step in starts] == sorted(step for _, step in starts), "training went back"
    assert starts[-1][1] >= 30
    assert (tmp_path / "end.txt").read_text() == expected


def test_a_job_that_is_started_again_with_more_or_fewer_ranks_goes_on(tmp_path: Path) -> None:
    expected = _unbroken(tmp_path / "unbroken")
    sizes = (1, 2, 1, 2)
    for number, size in enumerate(sizes):
        ranks = _ranks(tmp_path, size, 0.1)
        with _ended(*ranks):
            if number < len(sizes) - 1:
                enough = _newest(tmp_path) + 4
                _wait(f"steps of {size}", lambda enough=enough: _newest(tmp_path) >= enough, tmp_path)  # type: ignore[misc]
                for rank in ranks:
                    rank.send_signal(signal.SIGTERM)
            ended = 0 if number == len(sizes) - 1 else 128 + signal.SIGTERM
            assert [rank.wait(_PATIENCE_SECONDS) for rank in ranks] == [ended] * size
    starts = _starts(tmp_path)
    assert [ranks for ranks, _ in starts] == list(sizes)
    assert 0 == starts[0][1] < starts[1][1] < starts[2][1] < starts[3][1]
    assert (tmp_path / "end.txt").read_text() == expected


def _ranks(out: Path, size: int, seconds: float) -> list[subprocess.Popen[bytes]]:
    """Start the ranks of a job one by one, as a scheduler does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    command = [sys.executable, str(SCRIPT), str(out), str(seconds)]
    return [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in range(size)]


def test_sigterm_and_usr1_save_and_the_requeued_job_goes_on(tmp_path: Path) -> None:
    """What a scheduler does: it signals the job, and starts it again as it was."""
    expected = _unbroken(tmp_path / "unbroken")
    command = [sys.executable, str(SCRIPT), str(tmp_path), "0.1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for number, number_of_signal in enumerate((signal.SIGTERM, signal.SIGUSR1)):
        job = subprocess.Popen(command, env=environment | {"MASTER_PORT": str(_free_port())})
        at = tmp_path / f"at-{job.pid}.txt"
        begins = 3 + 10 * number
        _wait("a step", lambda at=at, begins=begins: at.exists() and int(at.read_text() or 0) >= begins, tmp_path)  # type: ignore[misc]
        job.send_signal(number_of_signal)
        assert job.wait(_PATIENCE_SECONDS) == 128 + number_of_signal
        assert _newest(tmp_path) >= int(at.read_text())
    subprocess.run(command, env=environment | {"MASTER_PORT": str(_free_port())}, check=True, timeout=_PATIENCE_SECONDS)
    starts = _starts(tmp_path)
    assert [ranks for ranks, _ in starts] == [1, 1, 1]
    assert 0 < starts[1][1] < starts[2][1]
    assert (tmp_path / "end.txt").read_text() == expected


def test_evaluation_can_ask_whether_a_signal_has_come(tmp_path: Path) -> None:
    with asyncckpt.Checkpointer(tmp_path / "run", preemption=asyncckpt.Preemption()) as ckpt:
        assert not ckpt.preempting
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ckpt.preempting
        with pytest.raises(asyncckpt.Preempted):
            ckpt.step(1, {"seen": 1})
    assert asyncckpt.Run(tmp_path / "run").newest().step == 1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray has an environment of its own: make test-ray")
def test_ray_train_starts_workers_again_and_knows_the_checkpoint(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent.parent / "examples" / "ray_train.py"
    command = [
        sys.executable,
        str(script),
        "--storage",
        str(tmp_path),
        "--fail",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_TRAIN_V2_ENABLED": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"best checkpoint: {tmp_path}/gpt/run/step-" in done.stdout
    assert "went on from step 4" in done.stdout + done.stderr
