"""Ranks killed and stopped at any moment of a save: nothing acknowledged is lost, nothing visible is torn."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fault_points import checkpointer, is_whole, state_of
from support.harness import Crew, Crews, Me

import asyncckpt

#: How many; 500 and more say something.
FAULTS = int(os.environ.get("ASYNCCKPT_RANK_FAULTS", "20"))
RANKS = 3
KINDS: list[dict[str, Any]] = [{}, {}, {"format": "zarr"}, {"codec": "planes"}, {"format": "zarr", "codec": "planes"}]


def _train(me: Me, path: str, first: int, deferred: bool, options: dict[str, Any]) -> None:
    """Save step after step until something happens; each step that this rank was told is durable goes into a file."""
    told = os.open(f"{path}-told-by-{me.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    run, _ = checkpointer(me, path, keep=asyncckpt.KeepLast(2), staging_bytes=4 << 20, **options)
    for step in range(first, first + 1000):
        pending = run.save(step, state_of(step))
        pending.add_done_callback(lambda done: None if done.failed() else os.write(told, b"%d\n" % done.step))
        if not deferred:
            pending.result(60)


def _told(path: Path) -> int:
    """The newest step that some rank was told is durable."""
    files = path.parent.glob(f"{path.name}-told-by-*")
    return max((int(line) for file in files for line in file.read_text().split("\n")[:-1]), default=0)


def _strike(path: Path, first: int, rng: random.Random) -> bool:
    """One job that ends badly: a rank is killed or stopped while it saves, and goes on or does not; then all die.
    False where a busy machine did not let the ranks save at all within their short deadlines."""
    with Crew(RANKS) as crew:
        crew.start(_train, str(path), first, rng.random() < 0.5, rng.choice(KINDS))
        began = time.monotonic()
        while _told(path) < first:  # it saves by now
            if time.monotonic() > began + 30:
                return False
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.25))  # any moment of a save will do
        victim = rng.randrange(RANKS)
        if rng.random() < 0.5:
            crew.signal(victim, signal.SIGKILL)
            time.sleep(rng.choice([0.0, 0.02, 0.2]))
        else:
            crew.signal(victim, signal.SIGSTOP)
            time.sleep(rng.choice([0.02, 0.2, 2.5]))  # the others have given up after the last
            if rng.random() < 0.5:
                crew.signal(victim, signal.SIGCONT)
                time.sleep(rng.uniform(0.0, 0.1))
        for rank in rng.sample(range(RANKS), RANKS):
            crew.signal(rank, signal.SIGKILL)
    return True


def _litter(path: Path) -> Iterator[str]:
    return (name for name in os.listdir(path) if name.startswith(".tmp-0"))


def _faults(crews: Crews, path: Path, count: int) -> tuple[int, int]:
    """How many strikes hit a save in flight, and the newest step after all of them."""
    rng = random.Random(2026)
    in_flight = newest = idle = 0
    crews.leave_room(RANKS)
    while count:
        struck = _strike(path, newest + 1, rng)
        count -= struck
        idle += not struck
        assert idle < 10, "the ranks do not save at all"
        in_flight += struck and any(_litter(path))
        newest = is_whole(str(path), lowest=max(_told(path), newest))
        if struck and count % 100 == 0:
            print(f"{count} faults to go, {in_flight} hit a save so far, step {newest}", flush=True)
    return in_flight, newest


@pytest.mark.slow
@pytest.mark.timeout(max(600, 20 * FAULTS))
def test_random_kills_and_stops_of_ranks_lose_and_tear_nothing(
    crews: Crews, tmp_path: Path, record_property: Any
) -> None:
    began = time.monotonic()
    in_flight, newest = _faults(crews, tmp_path / "run", FAULTS)
    minutes = (time.monotonic() - began) / 60
    text = f"{FAULTS} faults, {in_flight} of them in a save; step {newest}; {FAULTS / minutes:.0f} a minute"
    record_property("rank_faults", text)
    print(text)
    assert in_flight > FAULTS // 3, "hardly a fault hit a save: the test shows little"
    assert newest > FAULTS, "the ranks hardly saved anything"
