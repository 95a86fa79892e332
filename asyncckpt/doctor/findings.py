"""The doctor reports one finding a check, the speeds it measured, and the settings it recommends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

#: ``unsafe`` means that checkpoints can be lost or mixed up here, ``warning`` that there is something to know before
#: trusting it, ``note`` that it works in another way, or slower.
Status = Literal["good", "note", "warning", "unsafe"]


@dataclass(frozen=True, slots=True)
class Finding:
    """``check`` names what was looked at, ``seen`` says what was there, and ``advice`` what to do about it (nothing
    where it is empty)."""

    check: str
    status: Status
    seen: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Holds rates in bytes a second, ``fsync`` included; they are empty or 0 where nothing was measured. ``direct``
    (O_DIRECT) and ``buffered`` map the number of threads that write at one time to a rate; ``read`` is a cold read;
    ``encoding`` is the codec ``auto`` on one thread, on floats. ``publish_seconds`` is the time of a directory, a file,
    two fsyncs and a rename."""

    direct: Mapping[int, float] = field(default_factory=dict)
    buffered: Mapping[int, float] = field(default_factory=dict)
    read: float = 0.0
    encoding: float = 0.0
    fsync_seconds: float = 0.0
    publish_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Setting:
    """Recommends one keyword argument and says why. ``group`` is the options object it belongs to, as an argument of
    ``Checkpointer`` (``files``, ``writer``, ``run``) or of another one (``run.lease``)."""

    name: str
    value: str | float
    reason: str
    group: str


_CLASSES = {"files": "Safetensors", "writer": "WriterOptions", "run": "RunOptions", "run.lease": "LeaseOptions"}


@dataclass(frozen=True, slots=True)
class Report:
    """Holds all that the doctor found. ``path`` is the directory asked about, ``examined`` the nearest one that exists,
    which was looked at. ``speeds`` are in bytes a second."""

    path: str
    examined: str
    findings: tuple[Finding, ...]
    speeds: Speeds
    settings: tuple[Setting, ...]

    @property
    def unsafe(self) -> bool:
        """Whether checkpoints can be lost or mixed up here."""
        return any(finding.status == "unsafe" for finding in self.findings)

    def code(self) -> str:
        """Return the recommendation as Python that runs; it is empty where nothing can be written here."""
        if not self.settings:
            return ""
        names = [name for group, name in _CLASSES.items() if self._uses(group)]
        lines = [f"from asyncckpt import {', '.join(sorted(['Checkpointer', *names]))}", ""]
        lines += ["checkpointer = Checkpointer(", f"    {_text(self.path)},", *self._arguments("", "    "), ")"]
        return "\n".join(lines)

    def _uses(self, group: str) -> bool:
        return any(setting.group == group or setting.group.startswith(f"{group}.") for setting in self.settings)

    def _arguments(self, group: str, indent: str) -> list[str]:
        """Return the lines between the parentheses of an options object, or of ``Checkpointer`` where the group is
        empty."""
        lines = [f"{indent}{_line(one)}" for one in self.settings if one.group == group and one.name != "format"]
        for inner, name in _CLASSES.items():
            parent, _, argument = inner.rpartition(".")
            if parent == group and self._uses(inner):
                why = [f"  # {one.reason}" for one in self.settings if (one.group, one.name) == (inner, "format")]
                lines += [f"{indent}{argument}={name}({''.join(why)}", *self._arguments(inner, indent + "    ")]
                lines.append(f"{indent}),")
        return lines


def _line(setting: Setting) -> str:
    return f"{setting.name}={_text(setting.value)},  # {setting.reason}"


def _text(value: str | float) -> str:
    """Format a value as one would write it."""
    if isinstance(value, str):
        return json.dumps(value)
    if type(value) is int:
        for shift in (30, 20):
            if value and value % (1 << shift) == 0:
                return f"{value >> shift} << {shift}"
    return repr(value)
