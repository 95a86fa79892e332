"""Options of saves that store differences to the checkpoint before."""

from __future__ import annotations

from dataclasses import dataclass

from asyncckpt.errors import InvalidOption


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """Save differences to the checkpoint before, at most ``chain`` times in a row; then everything once.

    Worth it where weights move little between saves and are of low precision. Every checkpoint holds (as links) the
    files that it builds on, so it stays complete by itself; restoring reads up to ``chain + 1`` times the bytes.
    """

    chain: int = 4

    def __post_init__(self) -> None:
        if type(self.chain) is not int or self.chain < 1:
            raise InvalidOption(f"Delta: chain must be a whole number >= 1, not {self.chain!r}")


def chain_of(delta: Delta | None, shard_format: str, codec: str, incremental: bool) -> int:
    """How often in a row a file may be saved as differences. Raises ``InvalidOption`` where that cannot be."""
    if delta is None:
        return 0
    if shard_format != "safetensors" or codec == "none" or not incremental:
        raise InvalidOption(
            "delta needs format='safetensors' (zarr readers would take differences for values), a codec, such as "
            "'planes', and incremental=True"
        )
    return delta.chain
