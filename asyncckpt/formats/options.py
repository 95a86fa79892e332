"""What the files of a checkpoint are: a shard format with the options that it has, and no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from asyncckpt.codecs import codecs
from asyncckpt.errors import InvalidOption
from asyncckpt.protocols import Codec
from asyncckpt.types import ALIGNMENT_BYTES, LayoutOptions

_SHARD_BYTES = 4 << 30
_EXTENT_BYTES = 8 << 20


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Safetensors:
    """Shards in safetensors files, with an index that Hugging Face loaders follow. The default.

    ``codec``: ``none`` (any safetensors reader opens the files), ``auto``, ``planes``, ``lz4``, ``zstd``, ``blosc``, or
    one of ``asyncckpt.codecs`` with its own options; all lossless. ``delta``: save differences; needs a codec.
    ``per_rank``: in a job, each rank writes files of its own instead of parts of common ones; needs codec ``none``.
    ``shard_bytes``: data bytes after which a new file begins. ``extent_bytes``: the unit of staging, hashing and
    writing, a multiple of 4096. Raises ``InvalidOption`` and, for a codec that does not exist, ``UnknownName``.
    """

    codec: str | Codec = "none"
    delta: Delta | None = None
    per_rank: bool = False
    shard_bytes: int = _SHARD_BYTES
    extent_bytes: int = _EXTENT_BYTES

    def __post_init__(self) -> None:
        plain = codecs.get(self.codec).name == "none"
        _check_sizes("Safetensors", shard_bytes=self.shard_bytes, extent_bytes=self.extent_bytes)
        if self.delta is not None and plain:
            raise InvalidOption("Safetensors: delta needs a codec, such as codec='planes': differences are encoded")
        if self.per_rank and not plain:
            raise InvalidOption(f"Safetensors: per_rank needs codec='none', not {codecs.get(self.codec).name!r}")

    @property
    def format(self) -> str:
        """The name of the shard format."""
        return "safetensors"

    @property
    def chain(self) -> int:
        """How often in a row a file may be saved as differences."""
        return self.delta.chain if self.delta is not None else 0

    def layout(self, budget_bytes: int | None) -> LayoutOptions:
        """How tensors are laid out in files. ``budget_bytes``: of staging memory, which four extents have to fit in."""
        extent_bytes = _within(budget_bytes, self.extent_bytes)
        return LayoutOptions(shard_bytes=self.shard_bytes, extent_bytes=extent_bytes, by_rank=self.per_rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class Zarr:
    """One zarr group a component, which zarr, TensorStore and others open; every array is sharded and compressed.

    ``codec`` as for ``Safetensors``. ``shard_bytes``: the most data bytes of one shard. ``chunk_bytes``: the unit of
    staging, compression and reading, a multiple of 4096. Raises ``InvalidOption`` and ``UnknownName``.
    """

    codec: str | Codec = "none"
    shard_bytes: int = _SHARD_BYTES
    chunk_bytes: int = _EXTENT_BYTES

    def __post_init__(self) -> None:
        codecs.get(self.codec)
        _check_sizes("Zarr", shard_bytes=self.shard_bytes, chunk_bytes=self.chunk_bytes)

    @property
    def format(self) -> str:
        """The name of the shard format."""
        return "zarr"

    @property
    def chain(self) -> int:
        """Zarr readers would take differences for values: there are none."""
        return 0

    def layout(self, budget_bytes: int | None) -> LayoutOptions:
        """How tensors are laid out in files. ``budget_bytes``: of staging memory, which four chunks have to fit in."""
        return LayoutOptions(shard_bytes=self.shard_bytes, extent_bytes=_within(budget_bytes, self.chunk_bytes))


Files: TypeAlias = Safetensors | Zarr
FilesName: TypeAlias = Literal["safetensors", "zarr"]


def files_of(files: Files | FilesName) -> Files:
    """The options, also where only the format's name is given. Raises ``InvalidOption``."""
    if isinstance(files, Safetensors | Zarr):
        return files
    by_name: dict[str, Files] = {"safetensors": Safetensors(), "zarr": Zarr()}
    found = by_name.get(files) if isinstance(files, str) else None
    if found is None:
        raise InvalidOption(f"files must be Safetensors(...), Zarr(...), 'safetensors' or 'zarr', not {files!r}")
    return found


def _within(budget_bytes: int | None, nbytes: int) -> int:
    """As many bytes, or fewer, so that a quarter of the budget holds them: one extent is staged while others are
    written."""
    if budget_bytes is None:
        return nbytes
    return min(nbytes, max(ALIGNMENT_BYTES, budget_bytes // 4 // ALIGNMENT_BYTES * ALIGNMENT_BYTES))


def _check_sizes(kind: str, **sizes: int) -> None:
    for name, nbytes in sizes.items():
        if type(nbytes) is not int or nbytes < 1:
            raise InvalidOption(f"{kind}: {name} must be a whole number of bytes >= 1, not {nbytes!r}")
        if name != "shard_bytes" and nbytes % ALIGNMENT_BYTES:
            raise InvalidOption(f"{kind}: {name} must be a multiple of {ALIGNMENT_BYTES}, not {nbytes}")
