"""The safetensors file format: what a shard's bytes are, and a parser that trusts nothing.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header padded with
spaces, then the tensors' bytes without holes. The header is padded so that data begins at a multiple of 4096:
the official reader accepts that, and extents then start on aligned tensor bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from asyncckpt.dtypes import ITEM_BYTES
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.plain import loads
from asyncckpt.protocols import ALIGNMENT_BYTES, Placement, Shard, TensorSpec

#: The official reader refuses larger headers too.
MAX_HEADER_BYTES = 100_000_000


class SafetensorsFormat:
    """See the module's docstring."""

    name = "safetensors"
    suffix = ".safetensors"

    def image(self, specs: Sequence[TensorSpec]) -> tuple[bytes, list[int], int]:
        """``(header, begins, nbytes)`` for tensors in this order. Pure."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begins: list[int] = []
        position = 0
        for spec in specs:
            begins.append(position)
            end = position + spec.nbytes
            entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (position, end)}
            position = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        padded = -(-(8 + len(text)) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        header = (padded - 8).to_bytes(8, "little") + text.ljust(padded - 8)
        return header, [padded + begin for begin in begins], padded + position

    def index(self, component: str, shards: Sequence[Shard]) -> tuple[str, bytes]:
        """The ``*.safetensors.index.json`` that Hugging Face loaders follow."""
        weight_map = {placement.spec.name: shard.file for shard in shards for placement in shard.placements}
        total = sum(placement.spec.nbytes for shard in shards for placement in shard.placements)
        body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return f"{component}.safetensors.index.json", (json.dumps(body, indent=2) + "\n").encode()


def parse_header(head: bytes, file_nbytes: int, what: str) -> list[Placement]:
    """The tensors of a file that begins with ``head`` (8 bytes and the whole header), in file order.

    Raises ``CheckpointDamaged`` on anything the format does not allow: a header past the end or over 100 MB,
    duplicate names, overlaps, gaps, shapes that do not match their byte range, unknown dtypes.
    """
    header_nbytes = header_length(head, file_nbytes, what)
    entries = loads(bytes(head[8 : 8 + header_nbytes]).rstrip(b" "), what)
    if not isinstance(entries, dict):
        raise CheckpointDamaged(f"{what}: the safetensors header is no JSON object")
    base = 8 + header_nbytes
    placements: list[Placement] = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointDamaged(f"{what}: tensor {name!r} has a malformed header entry")
        spec, begin = _entry(name, entry["dtype"], entry["shape"], entry["data_offsets"], what)
        placements.append(Placement(spec, base + begin, base + begin + spec.nbytes))
    placements.sort(key=lambda placement: (placement.begin, placement.end))
    position = base
    for placement in placements:
        if placement.begin != position:
            raise CheckpointDamaged(f"{what}: tensor {placement.spec.name!r} leaves a gap or overlaps another")
        position = placement.end
    if position != file_nbytes:
        raise CheckpointDamaged(f"{what}: the header describes {position} bytes, the file has {file_nbytes}")
    return placements


def header_length(head: bytes, file_nbytes: int, what: str) -> int:
    """The JSON header's length from the file's first 8 bytes. Raises ``CheckpointDamaged`` before anything is read."""
    if len(head) < 8 or file_nbytes < 8:
        raise CheckpointDamaged(f"{what}: too short for a safetensors file")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES or length > file_nbytes - 8:
        raise CheckpointDamaged(f"{what}: header length {length} is over the limit or past the end")
    return length


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor; the caller has checked dtype and shape."""
    count = ITEM_BYTES[dtype]
    for size in shape:
        count *= size
    return count


def _entry(name: str, dtype: object, shape: object, offsets: object, what: str) -> tuple[TensorSpec, int]:
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointDamaged(f"{what}: tensor {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > 64 or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
        raise CheckpointDamaged(f"{what}: tensor {name!r} has a malformed shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise CheckpointDamaged(f"{what}: tensor {name!r} has malformed offsets")
    sizes = tuple(n for n in shape if type(n) is int)
    begin, end = (n for n in offsets if type(n) is int)
    nbytes = tensor_nbytes(dtype, sizes)
    if end - begin != nbytes:
        raise CheckpointDamaged(f"{what}: tensor {name!r} of shape {list(sizes)} does not fill its byte range")
    return TensorSpec(name, dtype, sizes, nbytes), begin
