"""Checkpoints' directories get their names from a template; no such name hides the directory or leads elsewhere."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping

from asyncckpt.errors import InvalidOption

DEFAULT = "step-{step:08d}"
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]{0,199}\Z")
_STEP = re.compile(r"step[-_=]?(\d+)|(\d+)", re.IGNORECASE)


class NameTemplate:
    """Makes names from a template such as ``checkpoint_step_{step}_loss_{loss:.4f}``, with ``{step}`` and any metrics.

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
            text = self._template.format(step=step, **{name: metrics[name] for name in self._metrics})
        except ValueError as error:
            raise InvalidOption(f"step {step}: name={self._template!r} cannot be filled in: {error}") from error
        text = text if kind == "full" else f"{kind}-{text}"
        if not _SAFE.match(text):
            raise InvalidOption(f"step {step}: {text!r} is no plain directory name; change name={self._template!r}")
        return text


def step_in(name: str) -> int:
    """Return the step in a directory's name, -1 where it has none."""
    match = _STEP.search(name)
    return int(match.group(1) or match.group(2)) if match else -1


def form_of(name: str) -> str:
    """Return a name with its numbers replaced, so that names of one template are equal."""
    return re.sub(r"\d+", "#", name)
