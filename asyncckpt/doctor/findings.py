"""What the doctor says: one finding a check, what was measured, what to set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

#: ``unsafe``: checkpoints can be lost or mixed up here. ``warning``: something to know before trusting it. ``note``: it
#: works otherwise, or is slower.
Status = Literal["good", "note", "warning", "unsafe"]


@dataclass(frozen=True, slots=True)
class Finding:
    """``check`` names what was looked at, ``seen`` what was there, ``advice`` what to do about it."""

    check: str
    status: Status
    seen: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Bytes a second, ``fsync`` included; empty or 0 where not measured. ``direct`` and ``buffered``: by threads that
    write at one time. ``encoding``: the codec ``auto`` on one thread, on floats."""

    direct: Mapping[int, float] = field(default_factory=dict)
    buffered: Mapping[int, float] = field(default_factory=dict)
    read: float = 0.0
    encoding: float = 0.0
    fsync_seconds: float = 0.0
    publish_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Setting:
    """One keyword argument and why. ``group``: the options object it belongs to, as an argument of ``Checkpointer``
    (``files``, ``writer``, ``run``) or of another one (``run.lease``)."""

    name: str
    value: str | float
    reason: str
    group: str


_CLASSES = {"files": "Safetensors", "writer": "WriterOptions", "run": "RunOptions", "run.lease": "LeaseOptions"}


@dataclass(frozen=True, slots=True)
class Report:
    """All of it. ``path`` is the directory asked about, ``examined`` the one that was looked at (the nearest that
    exists)."""

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
        """The recommendation as Python that runs; empty where nothing can be written here."""
        if not self.settings:
            return ""
        names = [name for group, name in _CLASSES.items() if self._uses(group)]
        lines = [f"from asyncckpt import {', '.join(sorted(['Checkpointer', *names]))}", ""]
        lines += ["checkpointer = Checkpointer(", f"    {_text(self.path)},", *self._arguments("", "    "), ")"]
        return "\n".join(lines)

    def _uses(self, group: str) -> bool:
        return any(setting.group == group or setting.group.startswith(f"{group}.") for setting in self.settings)

    def _arguments(self, group: str, indent: str) -> list[str]:
        """The lines between the parentheses of an options object; of ``Checkpointer`` where the group is empty."""
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
    """As one would write it."""
    if isinstance(value, str):
        return json.dumps(value)
    if type(value) is int:
        for shift in (30, 20):
            if value and value % (1 << shift) == 0:
                return f"{value >> shift} << {shift}"
    return repr(value)
