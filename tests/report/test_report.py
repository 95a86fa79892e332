"""The report: what it tells is what is there, nobody's text becomes markup, and a real browser draws it alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from asyncckpt import Checkpointer, InvalidOption, KeepEvery, KeepLast, MissingExtra, Run, RunOptions
from asyncckpt.cli.app import app
from asyncckpt.report.facts import gather
from asyncckpt.report.page import page, write_report
from asyncckpt.storage.journal_file import append_line

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "run"
    model = torch.nn.Linear(300, 300)
    with Checkpointer(path, keep=[KeepLast(2), KeepEvery(3, weights_only=True)]) as run:
        for step in range(1, 8):
            run.save(step, {"model": model}, metrics={"loss": abs(step - 6) + 0.5, "<b>acc</b>": step / 10}).result()
            if step == 2:
                run.pin(2)
    forged = {
        "what": "failed",
        "at": 1e300,
        "step": 9,
        "name": "<img src=x onerror=alert(1)>",
        "reason": "</script><script>",
    }
    append_line(str(path), json.dumps(forged).encode(), create=True)
    Run(path).annotate(7, {"val": 0.25})
    Run(path).verify(7)
    return path


def test_what_is_there_is_joined_with_what_the_journal_tells(run: Path) -> None:
    facts = gather(Run(run), {"<b>acc</b>": "max"})
    assert [(point.step, point.kind, point.state) for point in facts.points] == [
        (1, "full", "deleted"),
        (2, "full", "pinned"),
        (3, "weights", "kept"),
        (4, "full", "deleted"),
        (5, "full", "deleted"),
        (6, "full", "kept"),
        (7, "full", "kept"),
    ]
    assert facts.points[0].metrics == {"loss": 5.5, "<b>acc</b>": 0.1}
    assert facts.points[-1].metrics["val"] == 0.25
    assert facts.best == {"loss": "step-00000006", "<b>acc</b>": "step-00000007"}
    assert facts.points[0].linked_bytes == 0
    assert (facts.points[1].linked_bytes or 0) > 300_000
    assert all((point.gigabytes_a_second or 0) > 0 for point in facts.points)
    assert [line.what for line in facts.health] == ["verify", "failed"]
    assert [step for _, step, _ in facts.environments] == [1]
    with pytest.raises(InvalidOption, match="its min or its max"):
        gather(Run(run), {"loss": "least"})


def test_damage_that_a_verification_found_is_marked(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        for step in (1, 2):
            run.save(step, {"model": torch.nn.Linear(2, 2)}).result()
    file = tmp_path / "run" / "step-00000001" / "state.json"
    before = file.read_bytes()
    for content, state in ((b"x" * len(before), "damaged"), (before, "kept")):
        file.write_bytes(content)
        Run(run.path).verify(1)
        assert [point.state for point in gather(Run(run.path)).points] == [state, "kept"]


def test_a_change_of_versions_is_told(run: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(run, tmp_path / "run"))
    line = {"what": "save", "at": 2e9, "step": 10, "name": "s", "environment": {"torch": "9.9", "x": None}}
    append_line(str(path), json.dumps(line).encode(), create=True)
    facts = gather(Run(path))
    assert facts.environments[-1][1:] == (10, {"torch": "9.9"})
    assert "torch 9.9" in page(facts)


def test_nobodys_text_becomes_markup(run: Path) -> None:
    text = page(gather(Run(run)))
    body = text[text.rindex("<body>") :]
    assert "&lt;img src=x" in body
    assert "<img" not in body
    assert "<b>acc" not in body
    assert "</script><script>" not in re.sub(r"<script[^>]*>.*?</script>", "", body)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", body), "nothing is fetched"


def test_a_run_without_a_journal_has_a_page_too(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run", run=RunOptions(journal=False)) as run:
        for step in (1, 2):
            run.save(step, {"w": torch.ones(3)}, metrics={"loss": 1.0}).result()
    facts = gather(Run(run.path))
    assert [(point.state, point.durable_seconds) for point in facts.points] == [("kept", None)] * 2
    assert "keeps no journal" in page(facts)
    (tmp_path / "empty").mkdir()
    assert "None." in page(gather(Run(tmp_path / "empty")))


def test_the_command_writes_one_file(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    result = call("report", run, "-o", out, "--best", "<b>acc</b>:max", "--json")
    row = json.loads(result.stdout)
    assert row["journal"]["save"] == 7
    assert row["best"]["<b>acc</b>"] == "step-00000007"
    assert list(tmp_path.iterdir()) == [out]
    assert call("report", run, "-o", out).exit_code == 5
    assert call("report", run, "-o", out, "--force").exit_code == 0
    assert call("report", run, "-o", tmp_path / "none" / "x.html").exit_code == 5
    assert call("report", run, "-o", out, "--force", "--best", "loss").exit_code == 2
    assert call("report", tmp_path / "none", "-o", out, "--force").exit_code == 3


def test_without_plotly_the_extra_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(MissingExtra, match=r"asyncckpt\[report\]"):
        write_report(Run(run), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_real_browser_draws_every_figure_without_a_network(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report(Run(run), out)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [str(CHROMIUM), *options, out.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    drawn = re.findall(r'<div id="(figure-\d)"[^>]*class="plotly-graph-div[^"]*js-plotly-plot', done.stdout)
    assert drawn == ["figure-0", "figure-1", "figure-2", "figure-3"]
    body = done.stdout[done.stdout.rindex("<body") :]
    for title in ("pinned", "deleted", "best", "training stalled", "linked", "val"):
        assert f">{title}</text>" in body, title
    assert "onerror=alert" not in re.sub(r"&lt;.*?&gt;", "", body)
