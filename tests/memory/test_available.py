"""A process's memory limit is the lowest on the way up from its own control group, and a host's ranks divide it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asyncckpt.memory import arena, available
from asyncckpt.memory.arena import Arena

GB = 1 << 30
MEMINFO = "MemTotal: 2147483648 kB\nMemAvailable: 2097152000 kB\n"
V2, V1 = "/sys/fs/cgroup", "/sys/fs/cgroup/memory"
FREE = 2_097_152_000 * 1024

CASES = {
    "no cgroups": ({}, FREE),
    "a scheduler limits the job, above the task": (
        {
            "/proc/self/cgroup": "0::/slurm/job_7/step_0/task_0\n",
            f"{V2}/slurm/job_7/memory.max": f"{64 * GB}\n",
            f"{V2}/slurm/job_7/memory.current": f"{4 * GB}\n",
            f"{V2}/slurm/job_7/step_0/task_0/memory.max": "max\n",
            f"{V2}/slurm/job_7/step_0/task_0/memory.current": "0\n",
        },
        60 * GB,
    ),
    "the nearer limit is the lower one": (
        {
            "/proc/self/cgroup": "0::/job/task\n",
            f"{V2}/job/memory.max": f"{64 * GB}\n",
            f"{V2}/job/task/memory.max": f"{8 * GB}\n",
            f"{V2}/job/task/memory.current": f"{GB}\n",
        },
        7 * GB,
    ),
    "a container sees its own group as the root": (
        {"/proc/self/cgroup": "0::/\n", f"{V2}/memory.max": f"{16 * GB}\n", f"{V2}/memory.current": "0\n"},
        16 * GB,
    ),
    "where the process is throttled counts as a limit": (
        {"/proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": "max\n", f"{V2}/a/memory.high": f"{2 * GB}\n"},
        2 * GB,
    ),
    "file pages that nobody uses are free": (
        {
            "/proc/self/cgroup": "0::/a\n",
            f"{V2}/a/memory.max": f"{8 * GB}\n",
            f"{V2}/a/memory.current": f"{7 * GB}\n",
            f"{V2}/a/memory.stat": f"anon {GB}\ninactive_file {5 * GB}\n",
        },
        6 * GB,
    ),
    "version 1, with an unlimited group below": (
        {
            "/proc/self/cgroup": "5:memory:/slurm/job_7/step_0\n1:name=systemd:/x\n0::/\n",
            f"{V1}/slurm/job_7/memory.limit_in_bytes": f"{64 * GB}\n",
            f"{V1}/slurm/job_7/memory.usage_in_bytes": f"{4 * GB}\n",
            f"{V1}/slurm/job_7/step_0/memory.limit_in_bytes": "9223372036854771712\n",
        },
        60 * GB,
    ),
    "more is used than is allowed": (
        {"/proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": "100\n", f"{V2}/a/memory.current": "200\n"},
        0,
    ),
}


@pytest.mark.parametrize(("files", "expected"), CASES.values(), ids=list(CASES))
def test_the_lowest_limit_counts(files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"/proc/meminfo": MEMINFO, **files}
    monkeypatch.setattr(available, "_lines", lambda file: known.get(file, "").splitlines())
    assert available.available_memory_bytes() == expected


def test_this_machine_has_an_answer() -> None:
    total = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert 0 < available.available_memory_bytes() <= total * 1024


def test_the_ranks_of_a_host_divide_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(available, "available_memory_bytes", lambda: 64 * GB)
    sizes = [GB] * 100
    assert available.default_budget(sizes) == 16 * GB
    assert available.default_budget(sizes, 4) == 4 * GB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert available.default_budget(sizes) == 8 * GB
    assert available.default_budget(sizes, 8) == 4 * GB, "one extent is staged while others are written"


@pytest.mark.parametrize("pin", [False, True])
def test_memory_that_others_have_taken_meanwhile_is_not_faulted_in(pin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([1 << 30] if not pin else [])
    monkeypatch.setattr(arena, "available_memory_bytes", lambda: next(free, 32 << 20))
    monkeypatch.setattr(arena.Region, "pin", lambda *_: None)
    pool = Arena()
    pool.grow(256 << 20, largest_bytes=1 << 20, pin=torch.device("cuda", 0) if pin else None)
    assert pool.wait_prepared(30)
    assert pool.budget_bytes == pool.free_bytes() == ((64 << 20) + (16 << 20) if not pin else 16 << 20)
    pool.acquire(pool.free_bytes()).view[:] = bytes(pool.budget_bytes)
    pool.close()


def test_the_largest_extent_is_staged_however_short_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "available_memory_bytes", lambda: 0)
    pool = Arena()
    pool.grow(8 << 20, largest_bytes=1 << 20)
    assert pool.acquire(1 << 20).nbytes == 1 << 20
    pool.close()
