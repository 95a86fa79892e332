"""What an export takes of a checkpoint: chosen tensors under their new names, and the filling of places for them."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from asyncckpt.codecs.dtypes import ITEM_BYTES
from asyncckpt.convert.plain_copies import PlainCopy, copy_plainly
from asyncckpt.convert.selection import Selection, checked_names
from asyncckpt.convert.source import Progress
from asyncckpt.errors import InvalidOption, UnsupportedValue
from asyncckpt.manifest.records import ExtentRecord, FileRecord, Manifest, StoredTensor, TensorRecord
from asyncckpt.protocols import Reader
from asyncckpt.read.damage import Damage
from asyncckpt.read.extents import Consume, Extents, read_alone
from asyncckpt.read.fill import fill
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.read.scatter import Window
from asyncckpt.state.dtypes import CODES, DTYPES

#: Tensors that are made of others on the way are made in pieces of about so many bytes.
PIECE_BYTES = 64 << 20
#: This file is in a result, or in its directory, where the format has no other room for what it was made of. Readers of
#: the formats leave it alone.
ORIGIN_FILE: Final = "asyncckpt.json"


@dataclass(frozen=True, slots=True, eq=False)
class StoredItem:
    """A tensor to export: its new ``name``, the ``component`` and the ``fqn`` that it is stored under, and the
    ``dtype`` (a safetensors code) that it gets. ``tied_to``: the item of the same tensor that comes before, if any."""

    name: str
    component: str
    fqn: str
    record: StoredTensor
    dtype: str
    tied_to: StoredItem | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.record.shape

    @property
    def count(self) -> int:
        """The number of its elements."""
        return self.record.nbytes // ITEM_BYTES[self.record.dtype]

    @property
    def nbytes(self) -> int:
        """Its size in the dtype that it gets, in bytes."""
        return self.count * ITEM_BYTES[self.dtype]


def components(manifest: Manifest, what: str, path: str) -> list[str]:
    """Return the components that ``what`` means: ``weights`` (all modules), ``all``, or the name of one. Raises
    ``InvalidOption``."""
    if what == "all":
        return list(manifest.components)
    if what == "weights":
        found = [name for name, record in manifest.components.items() if record.kind == "module"]
    else:
        found = [name for name in manifest.components if name == what]
    if not found:
        raise InvalidOption(f"{path}: nothing to export as {what!r}; components are {', '.join(manifest.components)}")
    return found


def items(
    checkpoint: OpenCheckpoint, chosen: Sequence[str], selection: Selection, dtype: torch.dtype | None
) -> list[StoredItem]:
    """Return the tensors of these components by their new names, which lack the component where there is only one. The
    first name of a tied tensor comes before the others. Raises ``InvalidOption`` where two get one name."""
    found: list[StoredItem] = []
    pairs: list[tuple[str, str]] = []
    for component in chosen:
        record = checkpoint.manifest.components[component]
        owners: dict[str, StoredItem] = {}
        for fqn, target in itertools.chain(((n, n) for n in record.tensors), record.aliases.items()):
            if not selection.takes(component, fqn):
                continue
            qualified = fqn if len(chosen) == 1 else f"{component}.{fqn}"
            new = selection.renamed(qualified)
            pairs.append((qualified, new))
            stored = record.tensors[target]
            item = StoredItem(new, component, fqn, stored, converted(stored.dtype, dtype), owners.get(target))
            owners.setdefault(target, item)
            found.append(item)
    checked_names(pairs, checkpoint.path)
    return found


def converted(code: str, dtype: torch.dtype | None) -> str:
    """Return the code of the dtype that a tensor gets: only floating ones are converted."""
    return CODES[dtype] if dtype is not None and DTYPES[code].is_floating_point else code


@dataclass(frozen=True, slots=True)
class Place:
    """A place for a tensor: the elements of ``target``, in row-major order, become those of the stored tensor from
    number ``first`` on. The target may be strided, and have another dtype. ``path`` and ``offset``: where a target that
    is neither lies in its file, if that is known."""

    record: StoredTensor
    target: torch.Tensor
    first: int = 0
    path: Path | None = None
    offset: int = 0

    def plain_copy(self) -> PlainCopy | None:
        """Return the copy of bytes that fills the place; None where they are other ones than were stored."""
        if self.path is None or self.first or not isinstance(self.record, TensorRecord):
            return None
        alike = self.target.dtype == DTYPES[self.record.dtype] and self.target.nbytes == self.record.nbytes
        return PlainCopy(self.record, self.path, self.offset) if alike else None


def view_at(memory: torch.Tensor, begin: int, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """Return the tensor that begins at byte ``begin`` of a file's memory."""
    count = 1
    for size in shape:
        count *= size
    item = ITEM_BYTES[dtype]
    data = memory[begin : begin + count * item]
    if begin % item:
        raise InvalidOption(f"a tensor of {dtype} would begin at byte {begin} of the file, which is not aligned")
    return data.view(DTYPES[dtype]).reshape(shape)


def fill_places(checkpoint: OpenCheckpoint, places: Sequence[Place], progress: Progress, what: str = "writing") -> None:
    """Read the tensors, verify them, and put them into their places; floating values are rounded to the nearest, ties
    to even. Blocks. Raises ``CheckpointDamaged``."""
    copies = [copy for place in places if (copy := place.plain_copy()) is not None]
    places = [place for place in places if place.plain_copy() is None]
    by_record: dict[int, tuple[StoredTensor, list[Window]]] = {}
    for place in places:
        entry = by_record.setdefault(id(place.record), (place.record, []))
        if place.target.numel():
            entry[1].append(Window(place.target, place.first))
    wanted = [(record, windows) for record, windows in by_record.values()]
    lock, done = threading.Lock(), [0]

    def read(reader: Reader, manifest: Manifest, extents: Extents, consume: Consume) -> list[Damage]:
        total = sum(extent.nbytes for _, extent in extents)

        def counted(file: FileRecord, extent: ExtentRecord, view: memoryview) -> None:
            consume(file, extent, view)
            with lock:
                done[0] += extent.nbytes
                progress(what, done[0], total)

        return read_alone(reader, manifest, extents, counted)

    if copies:
        copy_plainly(checkpoint, copies, read)
    if wanted:
        fill(checkpoint, wanted, read=read)


def pieces_of(checkpoint: OpenCheckpoint, item: StoredItem, item_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
    """Yield the tensor as flat pieces, in order, in the dtype that it gets; only one piece is in memory at a time. A
    piece ends between two rows of the last dimension."""
    row = item.shape[-1] if item.shape else 1
    rows = max(1, item_bytes // max(1, row * ITEM_BYTES[item.dtype]))
    for first in range(0, item.count, max(1, rows * row)):
        piece = torch.empty(min(rows * row, item.count - first), dtype=DTYPES[item.dtype])
        fill(checkpoint, [(item.record, [Window(piece, first)])])
        yield piece


def whole(checkpoint: OpenCheckpoint, item: StoredItem) -> torch.Tensor:
    """Return the whole tensor in memory, in the dtype that it gets."""
    tensor = torch.empty(item.shape, dtype=DTYPES[item.dtype])
    fill(checkpoint, [(item.record, [Window(tensor)])])
    return tensor


def check_overflow(checkpoint: OpenCheckpoint, items: Sequence[tuple[StoredItem, torch.Tensor]]) -> None:
    """Raise ``UnsupportedValue`` where a value became infinite in the dtype that its tensor got. ``items``: tensors and
    the places that they were put into."""
    for item, target in items:
        if _has_less_range(item):
            refuse_overflow(checkpoint, item, sum(count_infinite(item, part) for part in _parts(target)))


def count_infinite(item: StoredItem, values: torch.Tensor) -> int:
    """Return how many of these values of the item are infinite, where its dtype has less range than the stored one."""
    return int(torch.isinf(values).sum()) if _has_less_range(item) else 0


def refuse_overflow(checkpoint: OpenCheckpoint, item: StoredItem, infinite: int) -> None:
    """Raise ``UnsupportedValue`` where so many infinite values are more than were stored."""
    if not infinite:
        return
    exact = StoredItem(item.name, item.component, item.fqn, item.record, item.record.dtype)
    before = sum(int(torch.isinf(piece).sum()) for piece in pieces_of(checkpoint, exact))
    if infinite != before:
        raise UnsupportedValue(
            f"{checkpoint.path}: {item.name!r:.120} has {infinite - before} values too large for "
            f"{DTYPES[item.dtype]}, which would become infinite: export as bf16 or fp32, or --exclude it"
        )


def _has_less_range(item: StoredItem) -> bool:
    """Return whether a value of the stored dtype may be too large for the one that the tensor gets."""
    before, after = DTYPES[item.record.dtype], DTYPES[item.dtype]
    return after.is_floating_point and torch.finfo(after).max < torch.finfo(before).max


def _parts(target: torch.Tensor) -> Iterator[torch.Tensor]:
    if target.dim() == 0 or target.numel() <= PIECE_BYTES // 8:
        yield target
        return
    rows = max(1, PIECE_BYTES // 8 // max(1, target.numel() // target.shape[0]))
    for first in range(0, target.shape[0], rows):
        yield target[first : first + rows]


#: The keys of what a result records of where it came from.
ORIGIN_KEYS: Final = ("asyncckpt.source", "asyncckpt.step", "asyncckpt.manifest")


def origin(checkpoint: OpenCheckpoint) -> dict[str, str]:
    """Return what a result records of where it came from: the checkpoint's path, step and the digest of its manifest,
    which has the digests of everything else."""
    manifest: Manifest = checkpoint.manifest
    return dict(zip(ORIGIN_KEYS, (checkpoint.path, str(manifest.step), manifest.file_digest), strict=True))


def origin_json(checkpoint: OpenCheckpoint) -> bytes:
    """Return the content of ``ORIGIN_FILE``."""
    return (json.dumps(origin(checkpoint), indent=2) + "\n").encode()


def losses_beside(manifest: Manifest, chosen: Sequence[str], trees: Mapping[str, object]) -> dict[str, str]:
    """Return what of these components is no tensor, by name: a format that holds tensors alone loses it."""
    found: dict[str, str] = {}
    for component in chosen:
        tree = trees.get(component)
        record = manifest.components[component]
        if record.kind == "module":
            if tree:
                found[component] = "values in a module that are no tensors"
        elif not (record.kind == "tensor" and record.tensors):
            found[component] = "plain values, which the format cannot hold"
    return found
