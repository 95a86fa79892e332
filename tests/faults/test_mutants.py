"""The harness is believed because it catches planted bugs: every mutant by every check it names."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from asyncckpt.errors import AsyncCkptError
from faults import mutant_checks
from faults.mutants import MUTANTS, Mutant

#: A mutant is only caught by a check that passes where nothing is planted.
CHECKS = sorted({check for mutant in MUTANTS for check in mutant.caught_by}, key=lambda check: check.__name__)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_passes_where_nothing_is_planted(check: mutant_checks.Check, tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_caught(mutant: Mutant, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("mutant")  # not ``tmp_path``: some mutants leave descriptors open
    missed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        mutant.apply(patch)
        for number, check in enumerate(mutant.caught_by):
            place = root / str(number)
            place.mkdir()
            with contextlib.suppress(AssertionError, AsyncCkptError):  # a loud refusal is not acceptance either
                check(place)
                missed.append(check.__name__)
    assert not missed, f"{mutant.name!r} is not caught by {missed}"


def test_there_are_at_least_thirty() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 30
    print()
    for mutant in MUTANTS:
        print(f"{mutant.name:65}  {', '.join(check.__name__ for check in mutant.caught_by)}")
