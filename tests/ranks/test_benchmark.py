"""``python -m benchmarks ranks``: its jobs run, and its table says what they reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.figures import UNMEASURED
from benchmarks.suites.ranks import bars
from benchmarks.suites.ranks.command import Job, run_job
from benchmarks.suites.ranks.simulation import Planning

PLANNING = Planning(0.5, 0.003, 20 << 20, 1 / 1024)


def _save(ranks: int, peer: str, durable: float, stall: float = 0.01) -> dict[str, Any]:
    found = {"kind": "save", "ranks": ranks, "peer": peer, "durable_seconds": durable, "stall_seconds": stall}
    return {**found, "messages": 2} if peer == "asyncckpt" and ranks > 1 else found


def _events(durable: float, stall: float, restore: float, staged: int) -> list[dict[str, Any]]:
    found = [_save(1, "asyncckpt", 1.0)]
    for ranks, other in ((2, 4), (4, 2)):
        found += [_save(ranks, "asyncckpt", durable, stall), _save(ranks, "dcp_async_thread", 3.0, 0.04)]
        found.append(_save(ranks, "dcp_async_process", 2.2, 0.05))
        found.append({"kind": "restore", "ranks": ranks, "before": other, "seconds": restore, "raw_seconds": 1.0})
        found.append({"kind": "raw", "ranks": ranks, "seconds": 1.0, "nbytes": 10**9})
    found.append({"kind": "staged", "ranks": 4, "nbytes": [staged] * 4, "state_bytes": 4000})
    for together, read in ((True, 4 * staged), (False, 16000)):
        found.append({"kind": "resumed", "ranks": 4, "together": together, "nbytes": read, "state_bytes": 4000})
        found[-1]["seconds"] = 1.0
    return found


def test_every_bar_can_be_met_and_missed() -> None:
    good = bars.rows(_events(1.1, 0.02, 1.25, 1049), PLANNING)
    assert [row.met for row in good] == [True] * len(good), [row for row in good if not row.met]
    bad = bars.rows(_events(1.12, 0.021, 1.26, 1051), Planning(11.0, 0.003, 0, 1 / 1024))
    missed = [row.figure for row in bad if not row.met]
    assert [row.figure for row in bad if row.met] == ["messages of a rank (not 0) a save, steady state"], missed


def test_what_was_not_run_is_not_called_met() -> None:
    rows = bars.rows([_save(1, "asyncckpt", 1.0)], PLANNING)
    assert {row.met for row in rows if row.measured == UNMEASURED} == {None}
    assert sum(row.met is not None for row in rows) == 1  # the simulation, which needs no ranks


def test_the_best_variant_of_the_peer_is_compared_with() -> None:
    row = next(
        row
        for row in bars.rows(_events(1.1, 0.02, 1.0, 1000), PLANNING)
        if "2 ranks" in row.figure and "dcp" in row.figure
    )
    assert "2.20 s against 1.10 s" in row.measured


@pytest.mark.slow
def test_a_job_runs_on_its_ranks_and_one_that_fails_says_why(tmp_path: Path) -> None:
    staged, *resumed = run_job(Job("replicated", 2), tmp_path, "small")
    assert sum(staged["nbytes"]) == pytest.approx(staged["state_bytes"], rel=0.01)
    for event in resumed:  # an index, the manifest and modules that are imported come on top
        copies = 1 if event["together"] else 2
        assert event["nbytes"] == pytest.approx(copies * event["state_bytes"], rel=0.05)
    assert max(staged["nbytes"]) == pytest.approx(staged["state_bytes"] / 2, rel=0.05)
    with pytest.raises(RuntimeError, match="invalid choice"):
        run_job(Job("unheard of", 1), tmp_path, "small")
    assert not list(tmp_path.iterdir()), "a job leaves nothing behind"
