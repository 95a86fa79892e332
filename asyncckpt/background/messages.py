"""What the trainer tells its background process, once, once a layout, and once a save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asyncckpt.manifest.draft import Contents
from asyncckpt.protocols import Codec
from asyncckpt.types import Layout, LeaseOptions


@dataclass(frozen=True, slots=True)
class PassedLease:
    """The lease of the run in ``directory``, which the process goes on with where the trainer is gone. The descriptor
    of its lock comes with the message."""

    directory: str
    owner: str
    options: LeaseOptions


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message. ``path``, ``direct``: the store's. ``known``: the newest checkpoints by kind, as
    ``ReuseSource`` remembers them."""

    path: str
    direct: bool
    threads: int
    codec: Codec
    known: Mapping[str, Sequence[str]]
    lease: PassedLease | None


@dataclass(frozen=True, slots=True)
class LayoutMade:
    """A layout, which saves name by its ``number``."""

    number: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class RegionShared:
    """A region of the arena. Its descriptor comes with the message. ``budget_bytes``: of the arena with it."""

    number: int
    nbytes: int
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class Begin:
    """A save has begun. ``contents`` lack the layout, which has the number ``layout``. ``reuse``: whether files may be
    taken over from the checkpoint before. ``quarantined``: the checkpoints that were found damaged."""

    save: int
    layout: int
    contents: Contents
    reuse: bool
    chain: int
    started_seconds: float
    quarantined: Sequence[str]
    parent: str
    replaces: Sequence[str]
    timeout_seconds: float
    read_back: bool


@dataclass(frozen=True, slots=True)
class Sealed:
    """All units of a save were sent, and nothing speaks against publishing it."""

    save: int


@dataclass(frozen=True, slots=True)
class Commit:
    """The save is to be published, as the saves before it have ended. ``parent``: see ``Manifest``. ``replaces``: the
    checkpoints that make way for it."""

    save: int
    parent: str
    replaces: Sequence[str]


@dataclass(frozen=True, slots=True)
class Broken:
    """The save has failed in the trainer. ``error``: see ``failures.as_data``."""

    save: int
    error: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the process has asked for was done, or has raised ``error``."""

    call: int
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class MemoryShort:
    """So many threads of the trainer wait for staging memory."""

    waiting: int


@dataclass(frozen=True, slots=True)
class ReplaceStuck:
    """The threads that hang in the kernel with this save are to be replaced."""

    save: int
    stuck_seconds: float
