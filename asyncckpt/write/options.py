"""Options of the writers."""

from __future__ import annotations

from dataclasses import dataclass

from asyncckpt.errors import InvalidOption


@dataclass(frozen=True, kw_only=True, slots=True)
class WriterOptions:
    """``threads``: writers that hash and write extents. ``direct``: O_DIRECT where the file system has it.
    ``read_back``: read every byte back past the page cache and compare digests before publishing.
    ``durable_timeout_seconds``: after this a save that is not durable is given up (hung storage).
    ``stall_timeout_seconds``: the longest the training thread ever waits, for staging or for the storage when a run
    begins, before the save is given up."""

    threads: int = 3
    direct: bool = True
    read_back: bool = False
    durable_timeout_seconds: float = 3600.0
    stall_timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        if type(self.threads) is not int or self.threads < 1:
            raise InvalidOption(f"WriterOptions.threads must be a whole number >= 1, not {self.threads!r}")
        for name in ("durable_timeout_seconds", "stall_timeout_seconds"):
            if not getattr(self, name) > 0:
                raise InvalidOption(f"WriterOptions.{name} must be > 0, not {getattr(self, name)!r}")
