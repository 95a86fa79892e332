"""Checkpoints' directories get their names from a template; no such name hides the directory or leads elsewhere.

Names that a program gives to its checkpoints are text in their manifests, and no directories.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from asyncckpt.errors import InvalidOption

DEFAULT = "step-{step:08d}"
#: This word means the newest checkpoint to every verb, so no checkpoint can have it as a name of its own.
LATEST = "latest"
_MOST_CHARACTERS = 200
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]{0,199}\Z")


class NameTemplate:
    """Makes names from a template such as ``checkpoint_step_{step}_loss_{loss:.4f}``, with ``{step}`` and any metrics.
    The metric ``{epoch}`` is filled in as a whole number where it is one.

    Raises ``InvalidOption`` for a template without ``{step}``, and for one that makes no plain directory name.
    """

    def __init__(self, template: str) -> None:
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        except ValueError as error:
            raise InvalidOption(f"name={template!r} is no format string: {error}") from error
        if "step" not in fields or not all(name.isidentifier() for name in fields):
            raise InvalidOption(
                f"name={template!r} must contain {{step}} and may contain metrics ({{loss:.4f}}), plain names only"
            )
        self._template = template
        self._metrics = [name for name in fields if name != "step"]
        self.name(0, "full", dict.fromkeys(self._metrics, 0.0))  # refuses now a template that makes no usable name

    def name(self, step: int, kind: str, metrics: Mapping[str, float]) -> str:
        """Return the directory's name. Raises ``InvalidOption`` where it needs a metric that was not given."""
        lacking = [name for name in self._metrics if name not in metrics]
        if lacking:
            raise InvalidOption(
                f"step {step}: the name template {self._template!r} needs metrics={{{lacking[0]!r}: …}}"
            )
        try:
            text = self._template.format(step=step, **{name: _field(name, metrics[name]) for name in self._metrics})
        except ValueError as error:
            raise InvalidOption(f"step {step}: name={self._template!r} cannot be filled in: {error}") from error
        text = text if kind == "full" else f"{kind}-{text}"
        if not _SAFE.match(text):
            raise InvalidOption(f"step {step}: {text!r} is no plain directory name; change name={self._template!r}")
        return text


def _field(name: str, value: float) -> float | int:
    return int(value) if name == "epoch" and value.is_integer() else value


def another(name: str, number: int) -> str:
    """Return the name of a directory for another checkpoint of the step that ``name`` is for, which is its
    ``number``-th."""
    return name if number == 1 else f"{name}+{number}"


def checked_names(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names that a save is given, one or several. Raises ``InvalidOption`` for what is no name."""
    if given is None:
        return ()
    if not isinstance(given, str | Sequence):
        raise InvalidOption(f"name={given!r:.80} must be text, or a list of names")
    found = (given,) if isinstance(given, str) else tuple(given)
    for name in found:
        if not isinstance(name, str) or not name or len(name) > _MOST_CHARACTERS or not name.isprintable():
            raise InvalidOption(f"name={name!r:.250} must be text of 1 to {_MOST_CHARACTERS} printable characters")
        if "/" in name or name.strip() != name:
            raise InvalidOption(f"name={name!r} has a slash, or blanks at its ends; choose another")
        if name.casefold() == LATEST:
            raise InvalidOption(f"name={name!r}: 'latest' always means the checkpoint that was saved last; use 'last'")
    return tuple(dict.fromkeys(found))


def moves(name: str) -> bool:
    """Return whether a name is meant to move from checkpoint to checkpoint, as ``last`` and ``best`` are: one with a
    digit (``epoch=3``) says which one it is for."""
    return not any(character.isdigit() for character in name)
