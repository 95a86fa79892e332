"""``--help``: verbs by what a user wants, sentences that the terminal breaks, and what ``latest`` means."""

from __future__ import annotations

import itertools
import re

import pytest
from typer.testing import CliRunner

from asyncckpt.cli.app import PANELS, app

WIDTHS = (60, 80, 100, 140)
VERBS = tuple(verb.__name__.rstrip("_") for verbs in PANELS.values() for verb in verbs)


def _help(*verb: str, width: int = 100) -> str:
    result = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": str(width)})
    assert result.exit_code == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)


def test_verbs_stand_in_panels_the_demo_in_the_last() -> None:
    rows: dict[str, list[str]] = {}
    panel = ""
    for line in _help().splitlines():
        if title := re.match(r"╭─ (.+?) ─", line):
            panel = title[1]
        elif verb := re.match(r"│ ([a-z]\S*) ", line):
            rows.setdefault(panel, []).append(verb[1])
    rows.pop("Options", None)
    assert rows == {
        "Look": ["ls", "show", "best", "diff", "report", "follow"],
        "Check": ["verify", "doctor"],
        "Change": ["pin", "unpin", "annotate", "prune", "thin"],
        "Combine": ["average", "copy"],
        "Convert": ["export", "import"],
        "Try it out": ["demo"],
    }
    assert list(rows)[-1] == "Try it out"


def test_latest_is_explained_where_it_can_be_given() -> None:
    assert "damaged or not" in " ".join(_help().split())
    for verb in ("show", "diff", "verify", "pin", "unpin", "annotate", "export"):
        assert "'latest'" in _help(verb), verb


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("verb", ["", *VERBS])
def test_sentences_break_where_the_terminal_ends_not_where_the_source_did(verb: str, width: int) -> None:
    text = _help(*filter(None, [verb]), width=width).split("╭─")[0]
    lines = [line.strip() for line in text.splitlines()]
    for line, following in itertools.pairwise(lines):
        if line and following and not line.startswith("Usage"):
            assert len(line) + 1 + len(following.split()[0]) > width - 4, (line, following)


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_a_flag_shows_no_type(verb: str) -> None:
    assert "bool" not in _help(*filter(None, [verb])).lower()


def test_a_verb_says_in_its_first_sentence_what_it_does() -> None:
    for verbs in PANELS.values():
        for verb in verbs:
            first = (verb.__doc__ or "").split("\n\n")[0]
            assert re.match(r"[A-Z][a-z]+ ", first), verb.__name__
            assert "\n" not in first, f"{verb.__name__}: the table of verbs shows the first paragraph"
