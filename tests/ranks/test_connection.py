"""One connection to the job's store serves all threads of a process, and none of them waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from asyncckpt.errors import RankLost
from asyncckpt.ranks.connection import Connection, JobMessages, connection_to


class _Store:
    """A store in memory that can be stopped, and that takes time to be connected to."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.runs = threading.Event()
        self.runs.set()
        self.clones = 0
        self.connects = threading.Event()
        self.used: list[str] = []

    def clone(self) -> _Store:
        self.clones += 1
        self.connects.wait(10)
        other = _Store()
        other.values = self.values
        other.used = self.used
        return other

    def set(self, key: str, value: bytes) -> None:
        self.runs.wait(10)
        self.used.append(threading.current_thread().name)
        self.values[key] = value

    def get(self, key: str) -> bytes:
        self.runs.wait(10)
        return self.values[key]

    def check(self, keys: Sequence[str]) -> bool:
        self.runs.wait(10)
        return all(key in self.values for key in keys)


def test_no_call_waits_for_a_connection_that_takes_long() -> None:
    store = _Store()
    messages = JobMessages(Connection(store), "run", 5)
    began = time.monotonic()
    messages.set("a", b"1")
    assert messages.get("a") == b"1"
    assert time.monotonic() - began < 2
    assert store.values == {"run/a": b"1"}
    store.connects.set()


def test_all_threads_and_checkpointers_of_a_process_share_one_connection() -> None:
    store = _Store()
    store.connects.set()
    first, second = (JobMessages(connection_to(store, 0), name, 5) for name in ("one", "two"))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: (first if number % 2 else second).set(f"{number}", b""), range(20)))
    assert len(store.values) == 20
    assert len(set(store.used)) == 1
    assert store.clones == 1


def test_a_stopped_store_is_given_up_and_serves_again_once_it_runs() -> None:
    store = _Store()
    patient = JobMessages(Connection(store), "", 0.3)
    store.runs.clear()
    with pytest.raises(RankLost, match="did not answer within"):
        patient.set("lost", b"")
    time.sleep(0.1)
    began = time.monotonic()
    with pytest.raises(RankLost):  # who is less patient than others have been already does not wait at all
        patient.within(0.2).set("never", b"")
    assert time.monotonic() - began < 0.15
    with pytest.raises(RankLost):
        patient.within(1.0).set("cancelled", b"")
    store.runs.set()
    time.sleep(0.1)
    patient.set("after", b"")
    assert set(store.values) == {"lost", "after"}, "a call that was given up before it began must not be made later"


def test_a_store_that_is_gone_is_said() -> None:
    class Gone(_Store):
        def check(self, keys: Sequence[str]) -> bool:
            raise RuntimeError("Connection reset by peer")

    with pytest.raises(RankLost, match="is gone"):
        JobMessages(Connection(Gone()), "", 5).check(["a"])
