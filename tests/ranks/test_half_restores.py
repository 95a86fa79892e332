"""An error of one rank's own code ends the restore on every rank, soon and typed, and each says what it has changed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import Crews, Me
from support.parallelisms import TIMEOUT

import asyncckpt


class _Object:
    """Takes no state on one rank. ``holds``: what it reaches."""

    def __init__(self, error: BaseException | None = None, holds: Any = None) -> None:
        self.error = error
        self.holds = holds

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.error is not None:
            raise self.error


def _restore(me: Me, path: str, kind: str, alone: bool) -> Any:
    errors = {"OSError": OSError(5, "Input/output error"), "KeyError": KeyError("scale"), "exit": SystemExit(3)}
    torch.manual_seed(0)  # the ranks of a crew may come from a test that had each its own numbers
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        run.save(1, {"model": model, "object": _Object()}).result(60)
        with torch.no_grad():
            model.weight.fill_(2.0)
        broken = _Object(errors[kind] if me.rank == 1 else None, None if alone else model)
        began = time.monotonic()
        try:
            run.restore({"model": model, "object": broken})
        except (asyncckpt.AsyncCkptError, SystemExit) as error:
            said = type(error).__name__, str(error), getattr(error, "overwritten", None)
        else:
            said = "", "", ()
        waited = time.monotonic() - began
        run.save(2, {"model": model, "object": _Object()}).result(60)  # the ranks still agree on everything
    return *said, waited, model.weight[0, 0].item()


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("kind", ["OSError", "KeyError", "exit"])
def test_an_error_of_one_ranks_own_code_ends_all(kind: str, alone: bool, crews: Crews, tmp_path: Path) -> None:
    found = crews(2).values(_restore, str(tmp_path / "run"), kind, alone)
    own = ("SystemExit", "RestoreFailed") if kind == "exit" else ("StateMismatch", "StateMismatch")
    assert (found[1][0], found[0][0]) == own, found
    assert "rank 1" in found[0][1]
    assert kind == "exit" or ("object" in found[0][1] and kind in found[0][1])
    for _, _, overwritten, waited, weight in found:
        assert waited < 10, "the others waited for a rank that had failed"
        assert weight == (2.0 if alone else 1.0)
        assert overwritten is None or ("model" in overwritten) is not alone
