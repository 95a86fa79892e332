"""Which steps of a run are saved or being saved, and what a new save may be called."""

from __future__ import annotations

import threading
from collections.abc import Container, Mapping
from typing import Any

from asyncckpt.errors import InvalidOption, InvalidStep, StepExists
from asyncckpt.naming import NameTemplate


class Ledger:
    """Kept in memory, so that a save asks no disk on the training thread whether its step is free. Thread-safe.

    ``damaged`` are names that cannot be used: their steps may be saved again.
    """

    def __init__(self, path: str, template: NameTemplate, damaged: Container[str], *, overwrite: bool) -> None:
        self._path = path
        self._template = template
        self._damaged = damaged
        self._overwrite = overwrite
        self._lock = threading.Lock()
        self._names: dict[tuple[int, str], str] = {}
        self._last: dict[str, int] = {}

    def learn(self, step: int, kind: str, name: str) -> None:
        """Take note of what the directory holds already."""
        with self._lock:
            self._names[step, kind] = name
            self._last[kind] = max(step, self._last.get(kind, -1))

    def claim(self, step: int, kind: str, metrics: Mapping[str, float]) -> str:
        """The directory name for a new save.

        Raises ``InvalidStep`` for no whole number >= 0 or a step before the newest, ``StepExists`` for one that is
        saved or in flight, ``InvalidOption`` where the name template lacks a metric.
        """
        if type(step) is not int or step < 0:
            raise InvalidStep(f"step must be a whole number >= 0, not {step!r}")
        name = self._template.name(step, kind, metrics)
        with self._lock:
            existing = self._names.get((step, kind))
            last = self._last.get(kind, -1)
            if not self._overwrite:
                if existing is not None and existing not in self._damaged:
                    raise StepExists(
                        f"{self._path}: step {step} is already saved as {existing}. Save another step, use another "
                        f"directory, or pass overwrite=True"
                    )
                if step < last:
                    raise InvalidStep(
                        f"{self._path}: step {step} goes backwards, the newest is {last}. To continue the run call "
                        f"resume() first; to go back, restore(state, step=…) first; to start anew use another "
                        f"directory or overwrite=True"
                    )
            elif existing is not None and existing != name:
                raise StepExists(
                    f"{self._path}: step {step} is already saved as {existing}; overwriting needs the same name, and "
                    f"this one would be {name}"
                )
            self._names[step, kind] = name
            self._last[kind] = max(step, last)
        return name

    def release(self, step: int, kind: str) -> None:
        """The save failed: the step is free again."""
        with self._lock:
            self._names.pop((step, kind), None)

    def go_to(self, step: int) -> None:
        """Training continues from this step."""
        with self._lock:
            self._last["full"] = step

    def last(self) -> int | None:
        """The newest full step, saved, in flight or resumed from."""
        return self._last.get("full")

    def holds(self, step: int) -> bool:
        """Whether a full checkpoint of this step is saved or in flight."""
        name = self._names.get((step, "full"))
        return name is not None and name not in self._damaged


def numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Metrics as floats (a 0-d tensor is read, which waits for its device). Raises ``InvalidOption``."""
    found: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            raise InvalidOption(f"metrics[{name!r}] is no number: {value!r:.80}") from error
    return found
