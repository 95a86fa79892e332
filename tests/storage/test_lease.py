"""One live run per directory, and no longer than the run lives."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncckpt.errors import LeaseLost, RunLocked
from asyncckpt.storage import lease as lease_module
from asyncckpt.storage.lease import LEASE_FILE, Lease, read_holder
from asyncckpt.types import LeaseOptions

FAST = LeaseOptions(beat_seconds=0.05, ttl_seconds=0.5)
HOLD = """
import sys, time
from asyncckpt.storage.lease import Lease
Lease_held = Lease.acquire(sys.argv[1]); print("held", flush=True); time.sleep(60)
"""


def _holder(path: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def test_a_second_run_is_refused_naming_the_first(tmp_path: Path) -> None:
    with _holder(tmp_path) as child:
        try:
            with pytest.raises(RunLocked, match=rf"pid {child.pid}\).*takeover=True"):
                Lease.acquire(str(tmp_path), options=FAST)
        finally:
            child.kill()


def test_two_checkpointers_of_one_process_are_refused_too(tmp_path: Path) -> None:
    held = Lease.acquire(str(tmp_path))
    with pytest.raises(RunLocked):
        Lease.acquire(str(tmp_path))
    held.release()
    Lease.acquire(str(tmp_path)).release()


def test_after_a_sigkill_the_directory_is_free_at_once(tmp_path: Path) -> None:
    with _holder(tmp_path) as child:
        child.send_signal(signal.SIGKILL)
    began = time.monotonic()
    Lease.acquire(str(tmp_path)).release()
    assert time.monotonic() - began < 5, "waited for a holder of this very boot, whose lock the kernel released"


def test_a_forked_worker_does_not_keep_a_dead_trainers_lock(tmp_path: Path) -> None:
    held = Lease.acquire(str(tmp_path))
    fork = multiprocessing.get_context("fork")
    running = fork.Event()
    worker = fork.Process(target=_say_and_sleep, args=(running,))
    worker.start()
    assert running.wait(20)
    try:
        held._lock_file.close()  # what the kernel does when the trainer is killed
        Lease.acquire(str(tmp_path)).release()
    finally:
        worker.kill()
        worker.join()
        held._finalizer.detach()


def _say_and_sleep(running: Any) -> None:
    running.set()
    time.sleep(60)


def _from_another_host(path: Path, beat: int) -> None:
    record = {"owner": "abc", "host": "node7", "boot": "node7:x", "pid": 4, "beat": beat, "released": False}
    (path / LEASE_FILE).write_text(json.dumps(record))


def test_a_silent_holder_on_another_host_is_taken_for_dead_only_after_its_ttl(tmp_path: Path) -> None:
    _from_another_host(tmp_path, 1)
    began = time.monotonic()
    Lease.acquire(str(tmp_path), options=FAST).release()
    assert time.monotonic() - began >= FAST.ttl_seconds


def test_a_beating_holder_on_another_host_is_respected_even_where_locks_do_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _from_another_host(tmp_path, 1)
    sleep, beats = time.sleep, iter(range(2, 1000))

    def beating(seconds: float) -> None:
        sleep(seconds)
        _from_another_host(tmp_path, next(beats))

    monkeypatch.setattr(lease_module.time, "sleep", beating)
    with pytest.raises(RunLocked, match="host node7, pid 4"):
        Lease.acquire(str(tmp_path), options=FAST)


def test_a_run_that_was_taken_over_notices_before_it_publishes(tmp_path: Path) -> None:
    first = Lease.acquire(str(tmp_path), options=FAST)
    first.check()
    second = Lease.acquire(str(tmp_path), takeover=True, options=FAST)
    with pytest.raises(LeaseLost, match="taken over"):
        first.check()
    time.sleep(0.2)  # beats of the first must not overwrite the second's record
    second.check()
    first.release()
    second.check()
    second.release()
    holder = read_holder(str(tmp_path))
    assert holder is not None
    assert holder.released


def _at_the_next_beat(lease: Lease, then: Callable[[], object]) -> None:
    """Call ``then`` between that lease's look at the record and its writing, and let it write."""
    check, called = lease.check, threading.Event()

    def checked() -> None:
        check()
        if threading.current_thread().name == "asyncckpt-lease" and not called.is_set():
            lease.check = check  # type: ignore[method-assign]
            then()
            called.set()

    lease.check = checked  # type: ignore[method-assign]
    assert called.wait(10)
    time.sleep(0.1)  # it writes now


def test_a_late_beat_does_not_undo_giving_back(tmp_path: Path) -> None:
    """The directory then looked held, and a newcomer on another host waited for its end."""
    held = Lease.acquire(str(tmp_path), options=FAST)
    _at_the_next_beat(held, held._give_back)
    holder = read_holder(str(tmp_path))
    assert holder is not None
    assert holder.released


def test_a_late_beat_of_a_run_that_was_cut_off_does_not_cut_off_its_successor(tmp_path: Path) -> None:
    """The record was the old run's again: the new one took itself for taken over, and both ended."""
    old = Lease.acquire(str(tmp_path), options=FAST)
    successors: list[Lease] = []
    patient = LeaseOptions(beat_seconds=60.0)
    _at_the_next_beat(old, lambda: successors.append(Lease.acquire(str(tmp_path), takeover=True, options=patient)))
    (new,) = successors
    holder = read_holder(str(tmp_path))
    assert holder is not None
    assert holder.owner == old.owner, "the beat came before the takeover"
    new.check()
    with pytest.raises(LeaseLost):
        old.check()
    new._renew()
    holder = read_holder(str(tmp_path))
    assert holder is not None
    assert holder.owner == new.owner
    old.release()
    new.check()
    new.release()


def test_whoever_comes_by_the_same_lock_file_has_taken_the_directory_over(tmp_path: Path) -> None:
    """On another host, where locks do not hold across hosts."""
    held = Lease.acquire(str(tmp_path), options=LeaseOptions(beat_seconds=60.0))
    record = json.loads((tmp_path / LEASE_FILE).read_text())
    (tmp_path / LEASE_FILE).write_text(json.dumps(record | {"owner": "another", "host": "node7"}))
    with pytest.raises(LeaseLost, match="taken over by host node7"):
        held.check()
    held.release()


def test_a_record_that_cannot_be_read_is_no_takeover(tmp_path: Path) -> None:
    """A process without a free descriptor was told that another run had taken its directory over."""
    held = Lease.acquire(str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, limits[0]), limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(OSError, match="Too many open files") as caught:
            held.check()
        assert not isinstance(caught.value, LeaseLost)
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    held.check()
    held.release()
