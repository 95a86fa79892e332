"""A pool of threads works with those that the system gives it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from asyncckpt.write.threads import WriterPool


def _gives(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Have the system give so many threads, and no more until the list says so."""
    left, start = [count], threading.Thread.start

    def limited(thread: Any) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    return left


def test_a_pool_with_fewer_threads_than_it_wants_runs_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    left, pool, ran = _gives(monkeypatch, 1), WriterPool(4), threading.Semaphore(0)
    for _ in range(5):
        pool.submit(ran.release)
    assert all(ran.acquire(timeout=10) for _ in range(5))
    left[0] = 3
    together = threading.Barrier(5)  # four threads at once, and this one
    for _ in range(4):
        pool.submit(lambda: together.wait(10) and None)
    together.wait(10)
    pool.close()


def test_a_pool_without_any_thread_takes_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    left, pool, ran = _gives(monkeypatch, 0), WriterPool(2), threading.Event()
    with pytest.raises(RuntimeError, match="new thread"):
        pool.submit(ran.set)
    left[0] = 1
    pool.submit(lambda: None)
    pool.close()
    assert not ran.is_set()
