"""Options of staging: how much host memory it takes, and what happens where that is full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from asyncckpt.errors import InvalidOption

OnBusy: TypeAlias = Literal["wait", "skip", "error"]
Snapshot: TypeAlias = Literal["auto", "device", "host"]
_LEAST_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class StagingOptions:
    """Says how much host memory staging takes, and what happens where that is full.

    ``budget_bytes``: host memory that snapshots are staged in; by default the state's size, at most a quarter of the
    memory that is free when it is allotted. ``on_busy``: what a save that is due does while earlier saves hold that
    memory: ``wait`` (training stalls), ``skip`` (``step`` returns None; an explicit ``save`` waits) or ``error``
    (``ArenaBusy``). ``max_in_flight``: the most saves that are not durable at one time. ``stall_timeout_seconds``: how
    long the training thread waits at most for earlier saves, for staging, or for the storage when a run begins, each;
    then the save is given up.

    ``snapshot``: where the state is copied to first. ``"host"``: to ``budget_bytes`` of the host, before ``save``
    returns or, after ``watch``, until the update. ``"device"``: inside ``save`` into memory of its CUDA device, as
    large as the state, and from there to the host, while training may change anything; ``watch`` and ``guard`` are not
    needed. Where the device has no room at the peak of training, with a reserve, ``save`` raises ``NotEnoughMemory``:
    make the first save after a whole iteration, so that the peak is known. ``"auto"`` is ``"host"`` until the other way
    has been measured. Raises ``InvalidOption``."""

    budget_bytes: int | None = None
    on_busy: OnBusy = "wait"
    max_in_flight: int = 2
    stall_timeout_seconds: float = 600.0
    snapshot: Snapshot = "auto"

    def __post_init__(self) -> None:
        if self.on_busy not in ("wait", "skip", "error"):
            raise InvalidOption(f"StagingOptions.on_busy must be 'wait', 'skip' or 'error', not {self.on_busy!r}")
        if self.snapshot not in ("auto", "device", "host"):
            raise InvalidOption(f"StagingOptions.snapshot must be 'auto', 'device' or 'host', not {self.snapshot!r}")
        budget = self.budget_bytes
        if budget is not None and (type(budget) is not int or budget < _LEAST_BYTES):
            raise InvalidOption(f"StagingOptions.budget_bytes must be at least {_LEAST_BYTES} bytes, not {budget!r}")
        if type(self.max_in_flight) is not int or self.max_in_flight < 1:
            raise InvalidOption(f"StagingOptions.max_in_flight must be >= 1, not {self.max_in_flight!r}")
        if not self.stall_timeout_seconds > 0:
            raise InvalidOption(f"StagingOptions.stall_timeout_seconds must be > 0, not {self.stall_timeout_seconds!r}")
