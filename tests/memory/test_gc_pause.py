"""Garbage collection is held back without taking it from whoever else has a say in it."""

from __future__ import annotations

import gc
import multiprocessing
import threading
from collections.abc import Iterator

import pytest

from asyncckpt.memory.gc_pause import gc_paused

THRESHOLDS = (700, 10, 10)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before, enabled = gc.get_threshold(), gc.isenabled()
    gc.enable()
    gc.set_threshold(*THRESHOLDS)
    yield
    gc.set_threshold(*before)
    if not enabled:
        gc.disable()


def collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def test_nothing_is_collected_meanwhile_and_afterwards_it_is_again() -> None:
    with gc_paused():
        before = collections()
        kept = [[] for _ in range(5000)]  # type: ignore[var-annotated]
        assert collections() == before
    assert gc.get_threshold() == THRESHOLDS
    kept += [[] for _ in range(5000)]
    assert collections() > before


@pytest.mark.parametrize("enabled", [True, False])
def test_a_collector_that_a_trainer_switches_meanwhile_stays_as_he_left_it(enabled: bool) -> None:
    """Trainers switch it off and collect at steps of their choice; we parse manifests on other threads."""
    if enabled:
        gc.disable()
    with gc_paused():
        gc.enable() if enabled else gc.disable()
    assert gc.isenabled() == enabled
    assert gc.get_threshold() == THRESHOLDS


def test_thresholds_that_somebody_sets_meanwhile_stay() -> None:
    with gc_paused():
        gc.set_threshold(5, 6, 7)
    assert gc.get_threshold() == (5, 6, 7)


def test_the_last_of_several_threads_ends_it() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with gc_paused():
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    with gc_paused():
        thread.start()
        assert inside.wait(20)
    assert gc.get_threshold()[0] == 0
    leave.set()
    thread.join()
    assert gc.get_threshold() == THRESHOLDS


def test_a_child_that_is_forked_meanwhile_collects() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with gc_paused():
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(20)
    hears, said = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: said.send(gc.get_threshold()))
    child.start()
    assert hears.poll(20)
    assert hears.recv() == THRESHOLDS
    child.join()
    leave.set()
    thread.join()
