"""Options of the writers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from asyncckpt.codecs import digests
from asyncckpt.errors import InvalidOption
from asyncckpt.types import MAX_EXTENT_BYTES

ProcessChoice: TypeAlias = Literal["auto", "always", "never"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WriterOptions:
    """Says how saves are written.

    ``threads``: how many threads hash and write, and how many encode. ``direct``: write with O_DIRECT where the file
    system has it. ``digest``: the algorithm that proves the bytes: ``xxh3-128`` (default), ``crc32c``, ``sha256``, or
    ``blake3`` (extra ``hashes``). ``reuse_unchanged``: link files whose bytes equal the previous checkpoint's instead
    of writing them (frozen parameters get files of their own); every checkpoint stays complete by itself.
    ``read_back``: read every byte back past the page cache and compare digests before publishing.
    ``asset_bytes``: the assets of one checkpoint have at most so many bytes, 64 MiB by default, 1 GiB at most.
    ``durable_timeout_seconds``: give a save up that is not durable so long after it was asked for (hung storage).
    ``process``: where saves are hashed, written and published. ``auto`` (default) has a background process do it, which
    takes next to nothing of the trainer's interpreter, where the first state that is saved has 256 MiB or more;
    ``always`` does so whatever its size, and ``never`` has threads of the trainer do it. Threads do it in any case
    where no process can (docs/design/021-background-process.md).
    Raises ``InvalidOption``, ``UnknownName`` and ``MissingExtra``."""

    threads: int = 3
    direct: bool = True
    digest: str = digests.DEFAULT
    reuse_unchanged: bool = True
    read_back: bool = False
    durable_timeout_seconds: float = 3600.0
    asset_bytes: int = 64 << 20
    process: ProcessChoice = "auto"

    def __post_init__(self) -> None:
        if type(self.threads) is not int or self.threads < 1:
            raise InvalidOption(f"WriterOptions.threads must be a whole number >= 1, not {self.threads!r}")
        if type(self.asset_bytes) is not int or not 0 <= self.asset_bytes <= MAX_EXTENT_BYTES:
            raise InvalidOption(
                f"WriterOptions.asset_bytes must be from 0 to {MAX_EXTENT_BYTES}, not {self.asset_bytes!r}"
            )
        if self.process not in ("auto", "always", "never"):
            raise InvalidOption(f"WriterOptions.process must be 'auto', 'always' or 'never', not {self.process!r}")
        digests.get(self.digest)
        if not self.durable_timeout_seconds > 0:
            raise InvalidOption(
                f"WriterOptions.durable_timeout_seconds must be > 0, not {self.durable_timeout_seconds!r}"
            )
