"""Recorded results: what a run measured comes back from its file, and nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cli
from benchmarks.harness import report, results
from benchmarks.harness.results import Result, Table
from benchmarks.harness.runner import Job, Run

ENVIRONMENT: dict[str, str | int] = {
    "date": "2026-11-27",
    "cpu": "a CPU",
    "cores": 2,
    "memory_bytes": 8 << 30,
    "filesystem": "ext4",
    "kernel": "6.18",
    "python": "3.11",
    "torch": "2.13",
}


def _result() -> Result:
    table = Table("Bars", ["figure", "met"], [["a | b", "yes"], ["≤ 5 ms", "no"]])
    return Result("engine", "python -m benchmarks engine", ENVIRONMENT, [table], "2 cores.", {"runs": [1.5]})


def test_a_recorded_result_comes_back_with_its_tables(tmp_path: Path) -> None:
    path = results.record(_result(), tmp_path / "results")
    assert path.name == "2026-11-27-engine.json"
    found = results.load(path)
    assert (found.suite, found.data, found.environment) == ("engine", {"runs": [1.5]}, ENVIRONMENT)
    assert found.markdown() == _result().markdown()
    assert "| a \\| b | yes |" in found.markdown()


def test_a_second_run_of_a_day_replaces_nothing(tmp_path: Path) -> None:
    first, second = (results.record(_result(), tmp_path) for _ in range(2))
    assert (first.name, second.name) == ("2026-11-27-engine.json", "2026-11-27-engine-2.json")


def test_the_tables_are_printed_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = results.record(_result(), tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["tables", str(path)])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == _result().markdown().strip()


@pytest.mark.parametrize("content", ["[]", "{", '{"version": 2}', '{"version": 1, "tables": []}', '{"version": 1}'])
def test_another_file_is_not_taken_for_a_result(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"is not a result|Expecting"):
        results.load(path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["tables", str(path)])
    assert ended.value.code == 2


def test_every_figure_of_a_run_is_in_its_result(tmp_path: Path) -> None:
    events = [{"kind": "state", "nbytes": 10**9, "tensors": 3}, {"kind": "raw", "seconds": 0.5, "nbytes": 10**9}]
    for number, seconds in enumerate((2.0, 1.0), 1):
        events.append({"kind": "save", "number": number, "stall_seconds": 0.1, "durable_seconds": seconds})
        events.append({"kind": "raw", "seconds": 0.5, "nbytes": 10**9})
    runs = [Run(Job("saves", "asyncckpt", 1, 2), events), Run(Job("saves", "torch_save", 1, 2), [], "it failed")]
    options = {"suite": "peers", "rounds": 1, "size": "small", "peers": ["asyncckpt"]}
    found = report.result(runs, ["asyncckpt"], ENVIRONMENT, options, "python -m benchmarks peers")
    back = results.load(results.record(found, tmp_path))
    assert [run["events"] for run in back.data["runs"]] == [events, []]
    assert "| 1.00 (1.00..1.00) | 0.50 (0.50..0.50) |" in back.markdown()
    assert "Failed: saves of torch_save." in back.footer
    assert json.loads(found.json())["data"]["options"] == options
