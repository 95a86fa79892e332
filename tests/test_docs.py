"""The face: what the README and the documentation show works, and no public name is left out of the reference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import scripts

import asyncckpt
from asyncckpt import Run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_LINK = re.compile(r"(?<!`)\[[^\]`]*(?:`[^`]*`[^\]`]*)*\]\(([^)\s#]+)(?:#[^)]*)?\)")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _python(page: Path) -> list[str]:
    return re.findall(r"^```python[^\n]*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_stays_a_face() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 85


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_training_loops_count_alike(page: Path) -> None:
    for loop in re.findall(r"for step in range\((.*)\):", page.read_text()):
        assert loop.startswith("start + 1, "), loop


def test_the_loop_that_newcomers_copy_runs_and_goes_on(tmp_path: Path) -> None:
    (loop,) = _python(ROOT / "README.md")
    assert _python(ROOT / "docs" / "index.md") == [loop], "the pages say the same"
    script = (
        "import sys, torch\n"
        "model = torch.nn.Linear(2, 2)\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)\n"
        "total = int(sys.argv[1])\n"
        "def train_step():\n"
        "    return 1.0\n" + loop + "\nprint('began after', start)\n"
    )
    for total, start in ((120, 0), (220, 100)):
        assert f"began after {start}" in scripts.run(script, total, cwd=tmp_path)
    assert [entry.step for entry in Run(tmp_path / "gpt-run").ls()] == [100, 200]


def test_the_tutorial_tells_what_happens(tmp_path: Path) -> None:
    script = _python(ROOT / "docs" / "tutorial.md")[0].replace("4096", "512")  # a smaller state, to be quick

    def train(*arguments: str, code: int = 0) -> str:
        return scripts.run(script, *arguments, cwd=tmp_path, code=code)

    train()
    run = tmp_path / "first-run"
    assert [entry.step for entry in Run(run).ls()] == [30, 40]
    undisturbed = Run(run).load_tensors()
    run.rename(tmp_path / "undisturbed")

    train("30", code=-9)
    newest = Run(run).ls()[-1].step
    assert newest in (10, 20, 30), "none, or one that was never saved"  # which depends on when the kill came
    assert Run(run).verify() == []
    assert train().startswith(f"starting after step {newest}\n")
    assert [entry.step for entry in Run(run).ls()] == [30, 40]
    resumed = Run(run).load_tensors()
    assert resumed.keys() == undisturbed.keys()
    assert all(resumed[name].equal(tensor) for name, tensor in undisturbed.items())


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(page.read_text() for page in sorted((ROOT / "docs" / "reference").glob("*.md")))
    shown = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    for name in asyncckpt.__all__:
        by_itself = f"asyncckpt.{name}" in shown
        assert by_itself or getattr(asyncckpt, name).__module__ in shown, f"docs/reference shows no {name}"


def test_the_reference_shows_methods_that_are_there() -> None:
    pages = "\n".join(page.read_text() for page in sorted((ROOT / "docs" / "reference").glob("*.md")))
    chosen = re.findall(r"^::: asyncckpt\.(\w+)\n(?: {4}.*\n)*? +members: \[(.+)\]$", pages, re.MULTILINE)
    assert [name for name, _ in chosen] == ["PendingSave"]
    for name, members in chosen:
        for member in members.split(", "):
            assert callable(getattr(getattr(asyncckpt, name), member, None)), f"{name} has no {member}"


def test_every_verb_is_on_the_commands_page() -> None:
    from asyncckpt.cli.app import PANELS

    page = (ROOT / "docs" / "cli.md").read_text()
    for panel, verbs in PANELS.items():
        assert f"| **{panel}** |" in page
        for verb in verbs:
            assert re.search(rf"`{verb.__name__.rstrip('_')}[ `]", page), verb.__name__
