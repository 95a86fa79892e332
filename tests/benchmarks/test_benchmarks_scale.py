"""The scale suite simulates large jobs with the product's own code, and runs real ranks."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from benchmarks.suites.scale import command, simulated
from benchmarks.suites.scale.models import JOBS, components, holdings


def test_every_rank_of_a_simulated_job_has_a_part_and_all_of_them_everything() -> None:
    for job in JOBS[:2]:
        specs = [spec for _, found in components(job.shapes()) for spec in found]
        for spec, held in zip(specs, holdings(job, specs, 1), strict=True):
            assert held.rows.bounds[-1] == (spec.shape[0] if spec.shape else 1)
            assert {rank for ranks in held.rows.holders for rank in ranks} <= set(range(job.ranks))


def test_the_suite_prints_its_bars(tmp_path: Path) -> None:
    result = command.run(tmp_path, 1, None, True, Console(quiet=True), sizes=(2,), quick=True)
    figures = [row["figure"] for row in result.data["bars"]]
    assert sum(figure.startswith("a rank's first plan") for figure in figures) == len(JOBS)
    assert sum(figure.startswith("uniting") for figure in figures) == len(simulated.MERGES)
    assert sum(figure.startswith("bytes read over those needed") for figure in figures) == 1
    assert "2 ranks on this host: ready, slowest" in figures
    assert all(job["opened"] for job in result.data["plans"])
