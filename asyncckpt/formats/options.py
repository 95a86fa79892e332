"""These options say what the files of a checkpoint are: each shard format has its own options and no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from asyncckpt.codecs import codecs
from asyncckpt.errors import InvalidOption
from asyncckpt.protocols import Codec
from asyncckpt.types import ALIGNMENT_BYTES, MAX_EXTENT_BYTES, LayoutOptions

_SHARD_BYTES = 4 << 30
_EXTENT_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """Makes a save store the differences to the checkpoint before it, at most ``chain`` times in a row; the next save
    then stores everything.

    This pays where weights are of low precision and change little between saves. Every checkpoint holds the files that
    it builds on, as links, so it stays complete by itself; a restore reads up to ``chain + 1`` times the bytes. Raises
    ``InvalidOption`` where ``chain`` is not a whole number >= 1.
    """

    chain: int = 4

    def __post_init__(self) -> None:
        if type(self.chain) is not int or self.chain < 1:
            raise InvalidOption(f"Delta: chain must be a whole number >= 1, not {self.chain!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Safetensors:
    """Stores tensors in safetensors files, with an index that Hugging Face loaders follow. This is the default.

    ``codec`` is ``none`` (any safetensors reader opens the files), ``auto``, ``planes``, ``lz4``, ``zstd``, ``blosc``,
    or one of ``asyncckpt.codecs`` with options of its own; all are lossless. ``delta``: save differences; this needs a
    codec. ``per_rank``: in a job, each rank writes files of its own instead of parts of common ones; this needs codec
    ``none``. With None, the default, that is so where a job opens thousands of files and most bytes would be written in
    pieces under an extent: common files are the same whatever the number of ranks, and suit hundreds of ranks.
    ``shard_bytes``: a new file begins after so many bytes of data, 4 GiB by default. ``extent_bytes``: so
    many bytes have a digest and are read at a time, a multiple of 4096, 8 MiB by default, 1 GiB at most. Raises
    ``InvalidOption`` and, for a codec that does not exist, ``UnknownName``.
    """

    codec: str | Codec = "none"
    delta: Delta | None = None
    per_rank: bool | None = None
    shard_bytes: int = _SHARD_BYTES
    extent_bytes: int = _EXTENT_BYTES

    def __post_init__(self) -> None:
        plain = codecs.get(self.codec).name == "none"
        _check_sizes("Safetensors", encoded=not plain, shard_bytes=self.shard_bytes, extent_bytes=self.extent_bytes)
        if self.delta is not None and plain:
            raise InvalidOption("Safetensors: delta needs a codec, such as codec='planes': differences are encoded")
        if self.per_rank and not plain:
            raise InvalidOption(f"Safetensors: per_rank needs codec='none', not {codecs.get(self.codec).name!r}")

    @property
    def format(self) -> str:
        """The name of the shard format: ``safetensors``."""
        return "safetensors"

    @property
    def chain(self) -> int:
        """The number of times in a row that a file may be saved as differences; 0 without ``delta``."""
        return self.delta.chain if self.delta is not None else 0

    @property
    def _by_rank(self) -> bool | None:
        return self.per_rank if codecs.get(self.codec).name == "none" else False

    def layout(self, budget_bytes: int | None) -> LayoutOptions:
        """Return how tensors are laid out in files. Four extents must fit into ``budget_bytes`` of staging memory, so
        extents are smaller where it is small."""
        extent_bytes = _within(budget_bytes, self.extent_bytes)
        return LayoutOptions(shard_bytes=self.shard_bytes, extent_bytes=extent_bytes, by_rank=self._by_rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class Zarr:
    """Stores each component as a zarr v3 group, which zarr, TensorStore and others open, and each tensor as an array.

    ``codec`` is what it is for ``Safetensors``. ``shard_bytes``: a shard has at most so many bytes of data, 4 GiB by
    default. ``chunk_bytes``: so many bytes are staged, compressed and read at a time, a multiple of 4096, 8 MiB by
    default, 1 GiB at most. A tensor of more than one chunk is sharded. Raises ``InvalidOption`` and, for a codec that
    does not exist, ``UnknownName``.
    """

    codec: str | Codec = "none"
    shard_bytes: int = _SHARD_BYTES
    chunk_bytes: int = _EXTENT_BYTES

    def __post_init__(self) -> None:
        encoded = codecs.get(self.codec).name != "none"
        _check_sizes("Zarr", encoded=encoded, shard_bytes=self.shard_bytes, chunk_bytes=self.chunk_bytes)

    @property
    def format(self) -> str:
        """The name of the shard format: ``zarr``."""
        return "zarr"

    @property
    def chain(self) -> int:
        """Always 0: nothing is saved as differences, which zarr's readers would take for values."""
        return 0

    def layout(self, budget_bytes: int | None) -> LayoutOptions:
        """Return how tensors are laid out in files. Four chunks must fit into ``budget_bytes`` of staging memory, so
        chunks are smaller where it is small."""
        return LayoutOptions(shard_bytes=self.shard_bytes, extent_bytes=_within(budget_bytes, self.chunk_bytes))


Files: TypeAlias = Safetensors | Zarr
FilesName: TypeAlias = Literal["safetensors", "zarr"]


def files_of(files: Files | FilesName) -> Files:
    """Return the options, or the default ones of the format that ``files`` names. Raises ``InvalidOption`` for anything
    else."""
    if isinstance(files, Safetensors | Zarr):
        return files
    by_name: dict[str, Files] = {"safetensors": Safetensors(), "zarr": Zarr()}
    found = by_name.get(files) if isinstance(files, str) else None
    if found is None:
        raise InvalidOption(f"files must be Safetensors(...), Zarr(...), 'safetensors' or 'zarr', not {files!r}")
    return found


def _within(budget_bytes: int | None, nbytes: int) -> int:
    """Return ``nbytes``, or less where a quarter of the budget is less, in whole blocks: one extent is staged while
    others are written."""
    if budget_bytes is None:
        return nbytes
    return min(nbytes, max(ALIGNMENT_BYTES, budget_bytes // 4 // ALIGNMENT_BYTES * ALIGNMENT_BYTES))


def _check_sizes(kind: str, *, encoded: bool, **sizes: int) -> None:
    most = MAX_EXTENT_BYTES - (ALIGNMENT_BYTES if encoded else 0)  # a frame takes a block more than its chunk
    for name, nbytes in sizes.items():
        if type(nbytes) is not int or nbytes < 1:
            raise InvalidOption(f"{kind}: {name} must be a whole number of bytes >= 1, not {nbytes!r}")
        if name != "shard_bytes" and nbytes % ALIGNMENT_BYTES:
            raise InvalidOption(f"{kind}: {name} must be a multiple of {ALIGNMENT_BYTES}, not {nbytes}")
        if name != "shard_bytes" and nbytes > most:
            raise InvalidOption(f"{kind}: {name} must be at most {most}, which readers take, not {nbytes}")
