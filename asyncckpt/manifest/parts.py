"""A manifest in parts: each rank of a large job lists what it has written in a file of its own, and the manifest proper
lists these files.

The manifest, the root of this small tree, has the digest of each part, so that nothing is acknowledged that one bit of
a part could change. Whoever lists a run or chooses a checkpoint reads roots alone; a restore reads the parts of those
ranks whose rows it needs. docs/format.md describes both.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from asyncckpt.codecs import digests
from asyncckpt.errors import CheckpointDamaged, ManifestInvalid
from asyncckpt.jsontree import dumps, loads
from asyncckpt.manifest.parse import Body, check_names, parse_components, parse_files, tensor_of
from asyncckpt.manifest.pieces import dumps_in_pieces
from asyncckpt.manifest.records import BoxRecord, ComponentRecord, ExtentRecord, FileRecord
from asyncckpt.manifest.spread import Spread, SpreadFile
from asyncckpt.memory.gc_pause import gc_paused
from asyncckpt.types import JsonValue

PART_FORMAT: Final = "asyncckpt-part"
PART_VERSION: Final = 5
#: What a rank lists is small: a larger part is taken for an attack.
MAX_PART_BYTES: Final = 1 << 30
#: Parts are kept parsed for whoever reads several tensors of the same rows: the last few, and as many more as have
#: this much text together. Parsed, they take about five times as much memory.
_KEPT: Final = 16
_KEPT_BYTES: Final = 32 << 20
#: So many rows are turned into text at once.
_AT_ONCE: Final = 256
_MOST_RANKS: Final = 1 << 22
_PART_NAME: Final = re.compile(r"part-[0-9]{5,}\.json")

#: It returns the bytes of a small file of the checkpoint, of at most so many.
ReadSmall = Callable[[str, int], bytes]


def part_name(rank: int) -> str:
    """Return the name of the file that is this rank's part of a manifest."""
    return f"part-{rank:05d}.json"


def is_part_name(name: str) -> bool:
    """Whether a file of this name could be a rank's part of a manifest, or lie in its place where case does not
    count."""
    return _PART_NAME.fullmatch(name.casefold()) is not None


@dataclass(frozen=True, slots=True)
class ListedPart:
    """``ListedPart`` is what the root says of a rank's part: the size and digest of its file, and the ``files`` that it
    describes, each with its size and the component that its tensors belong to."""

    nbytes: int
    digest: str
    files: tuple[tuple[str, int, str], ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """A part that was read and checked. ``boxes``: as JSON has them, by component and tensor."""

    body: Body
    files: Mapping[str, FileRecord]
    boxes: Mapping[str, Any]
    components: Mapping[str, ComponentRecord]
    values: Mapping[str, JsonValue]


class Parts:
    """``Parts`` are the parts of one manifest, the one of rank ``n`` at position ``n`` of ``listed``. Each is read when
    something that only it says is asked for. Thread-safe.

    ``where``: the manifest's file, for messages. ``read``: reads them; None where nobody is going to ask."""

    def __init__(
        self,
        listed: Sequence[ListedPart],
        spreads: Sequence[Spread],
        *,
        where: str,
        step: int,
        attempt: str,
        digest: str,
        read: ReadSmall | None,
    ) -> None:
        self.listed = listed
        self.spreads = spreads
        self.where = where
        self._step = step
        self._attempt = attempt
        self._digest = digest
        self._read = read
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, _Part] = OrderedDict()
        self._kept_bytes = 0
        self._by_component: dict[str, dict[int, tuple[str, ...]]] | None = None

    @property
    def ranks(self) -> int:
        """The number of parts."""
        return len(self.listed)

    def names(self) -> frozenset[str]:
        """Return the names of the files that the parts are."""
        return frozenset(map(part_name, range(len(self.listed))))

    def files(self) -> tuple[FileRecord, ...]:
        """Return the records of the parts' own files, and of those that they describe."""
        own = [
            FileRecord(part_name(rank), part.nbytes, (ExtentRecord(0, part.nbytes, part.digest),))
            for rank, part in enumerate(self.listed)
        ]
        described = [
            SpreadFile(name, nbytes, self, rank)
            for rank, part in enumerate(self.listed)
            for name, nbytes, _ in part.files
        ]
        return (*own, *described)

    # -- what records ask (PartSource) -------------------------------------------------------------------------------

    def boxes(self, rank: int, component: str, tensor: str, dtype: str) -> list[BoxRecord]:
        """See ``PartSource.boxes``."""
        part = self._part(rank)
        tensors = part.boxes.get(component, {})
        rows = tensors.get(tensor, []) if isinstance(tensors, dict) else None
        if not isinstance(rows, list):
            part.body.fail(f"has malformed boxes of {component:.80}")
        return self.boxes_of(rank, tensor, dtype, rows)

    def boxes_of(self, rank: int, tensor: str, dtype: str, rows: Iterable[Any]) -> list[BoxRecord]:
        """Return the boxes that rows of a rank's part describe, as JSON has them. Raises ``ManifestInvalid``."""
        part = self._part(rank)
        return [_box(part.body, tensor, dtype, row, part.files) for row in rows]

    def files_of(self, ranks: Iterable[int] | None, component: str) -> tuple[str, ...]:
        """See ``PartSource.files_of``."""
        if self._by_component is None:
            found: dict[str, dict[int, tuple[str, ...]]] = {}
            for rank, part in enumerate(self.listed):
                for name, _, holder in part.files:
                    ranked = found.setdefault(holder, {})
                    ranked[rank] = (*ranked.get(rank, ()), name)
            self._by_component = found
        here = self._by_component.get(component, {})
        return tuple(name for rank in (here if ranks is None else ranks) for name in here.get(rank, ()))

    def component_bytes(self, component: str) -> int:
        """See ``PartSource.component_bytes``."""
        return sum(nbytes for part in self.listed for _, nbytes, holder in part.files if holder == component)

    def extents(self, rank: int, file: str) -> tuple[ExtentRecord, ...]:
        """See ``PartSource.extents``."""
        return self._part(rank).files[file].extents

    def component(self, rank: int, name: str) -> ComponentRecord:
        """See ``PartSource.component``."""
        part = self._part(rank)
        if name not in part.components:
            part.body.fail(f"lacks the component {name:.80}, which the manifest finds there")
        return part.components[name]

    def values(self, rank: int, name: str) -> JsonValue:
        """See ``PartSource.values``."""
        part = self._part(rank)
        if name not in part.values:
            part.body.fail(f"lacks the values of {name:.80}, which the manifest finds there")
        return part.values[name]

    def rows(self, rank: int) -> Iterable[tuple[str, str, Any]]:
        """Yield what the part of a rank lists of tensors that are spread: component, tensor, and a box as JSON has it.
        Raises ``ManifestInvalid``."""
        part = self._part(rank)
        for component, tensors in part.boxes.items():
            if not isinstance(tensors, dict) or not all(isinstance(rows, list) for rows in tensors.values()):
                part.body.fail(f"has malformed boxes of {component:.80}")
            for tensor, rows in tensors.items():
                for row in rows:
                    yield component, tensor, row

    def components_of(self, rank: int) -> Mapping[str, ComponentRecord]:
        """Return the components that a rank has of its own, whether the root lists them or not."""
        return self._part(rank).components

    # -- reading -----------------------------------------------------------------------------------------------------

    def _part(self, rank: int) -> _Part:
        with self._lock:
            kept = self._kept.get(rank)
            if kept is not None:
                self._kept.move_to_end(rank)
                return kept
        if not 0 <= rank < len(self.listed):
            raise ManifestInvalid(f"{self.where}: the manifest has no part of rank {rank}")
        found = self._load(rank)
        with self._lock:
            if rank not in self._kept:
                self._kept_bytes += self.listed[rank].nbytes
            self._kept[rank] = found
            while len(self._kept) > _KEPT and self._kept_bytes > _KEPT_BYTES:
                self._kept_bytes -= self.listed[self._kept.popitem(last=False)[0]].nbytes
        return found

    @gc_paused()  # it has tens of thousands of rows, none of which is garbage
    def _load(self, rank: int) -> _Part:
        listed, name = self.listed[rank], part_name(rank)
        if self._read is None:
            raise ManifestInvalid(f"{self.where}: {name} cannot be read any more: open the checkpoint again")
        data = self._read(name, MAX_PART_BYTES)
        where = f"{self.where.removesuffix('manifest.json')}{name}"
        if len(data) != listed.nbytes or digests.get(self._digest)(data) != listed.digest:
            raise CheckpointDamaged(f"{where}: the content does not match its digest")
        return decode_part(
            data, where, step=self._step, attempt=self._attempt, rank=rank, digest=self._digest, listed=listed.files
        )


def encode_part(
    *,
    step: int,
    attempt: str,
    rank: int,
    files: Sequence[Mapping[str, Any]],
    boxes: Mapping[str, Mapping[str, Any]],
    components: Mapping[str, Any],
    values: Mapping[str, JsonValue],
) -> bytes:
    """Return the bytes of a part's file. ``files``: rows as ``json.file_to_json`` makes them. ``boxes``: component →
    tensor → its boxes in these files, each ``[offsets, shape, file, begin, end]``, with None for offsets where it is
    the whole tensor. ``components``, ``values``: those that the rank has of its own, as in a manifest and in
    ``state.json``."""
    head = {
        "format": PART_FORMAT,
        "format_version": PART_VERSION,
        "step": step,
        "attempt": attempt,
        "rank": rank,
    }
    rest = {
        "boxes": {name: dict(tensors) for name, tensors in boxes.items()},
        "components": dict(components),
        "values": dict(values),
    }
    listed = b",".join(map(_file_text, files))
    return b"".join((dumps(head)[:-2], b',"files":[', listed, b"],", dumps_in_pieces(rest)[1:], b"\n"))


def _file_text(row: Mapping[str, Any]) -> bytes:
    """Return the text of a file's row, made in pieces: it may have tens of thousands of extents."""
    rest = {key: value for key, value in row.items() if key != "extents"}
    return b"".join((dumps(rest)[:-2], b',"extents":', _list_in_pieces(row["extents"]), b"}"))


def decode_part(
    data: bytes,
    where: str,
    *,
    step: int,
    attempt: str,
    rank: int,
    digest: str,
    listed: Sequence[tuple[str, int, str]],
) -> _Part:
    """Parse a part and check it, all but its boxes, which are checked when they are asked for. ``listed``: the files
    that the root says it describes. Raises ``ManifestInvalid``."""
    try:
        body = Body(loads(data, where), where)
    except ManifestInvalid:
        raise
    except ValueError as error:
        raise ManifestInvalid(str(error)) from error
    if body.take("format", str) != PART_FORMAT or body.take("format_version", int) != PART_VERSION:
        body.fail("part is not of a format that this library knows")
    if (body.whole("step"), body.take("attempt", str), body.whole("rank")) != (step, attempt, rank):
        body.fail(f"part is not that of rank {rank} of this checkpoint")
    files = parse_files(body, digest)
    if sorted((record.name, record.nbytes) for record in files) != sorted((name, size) for name, size, _ in listed):
        body.fail("part describes other files than the manifest lists")
    by_name = {record.name: record for record in files}
    components = parse_components(body, by_name)
    holders = {name: component for name, _, component in listed}
    for name, component in components.items():
        if any(holders[file] != name for tensor in component.tensors.values() for file in tensor.files):
            body.fail(f"has tensors of {name:.80} in a file that the manifest lists of another component")
    return _Part(body, by_name, body.take("boxes", dict), components, body.take("values", dict))


def _box(body: Body, name: str, dtype: str, row: Any, files: Mapping[str, FileRecord]) -> BoxRecord:
    if not isinstance(row, list) or len(row) != 5 or not (row[0] is None or isinstance(row[0], list)):
        body.fail(f"has a malformed box of tensor {name!r:.80}")
    part = tensor_of(body, name, [dtype, *row[1:]], files)
    offsets = [0] * len(part.shape) if row[0] is None else [body.size(f"offset of {name:.80}", at) for at in row[0]]
    if len(offsets) != len(part.shape):
        body.fail(f"has a box of tensor {name!r:.80} with other dimensions")
    return BoxRecord(tuple(offsets), part.shape, part.file, part.begin, part.end)


# -- the root --------------------------------------------------------------------------------------------------------


def parts_json(parts: Parts) -> bytes:
    """Return what the root says of its parts, as JSON text that goes on with an object. It is made in pieces, because
    one call would hold the interpreter until it is done."""
    listed = [[part.nbytes, part.digest, part.files] for part in parts.listed]
    held = [[ranks if len(ranks) != 1 else ranks[0] for ranks in spread.holders] for spread in parts.spreads]
    spreads = [[spread.bounds, holders] for spread, holders in zip(parts.spreads, held, strict=True)]
    return b"".join((b',"parts":', _list_in_pieces(listed), b',"spreads":', _list_in_pieces(spreads)))


def _list_in_pieces(rows: Sequence[Any]) -> bytes:
    texts = [json.dumps(rows[at : at + _AT_ONCE], separators=(",", ":"))[1:-1] for at in range(0, len(rows), _AT_ONCE)]
    return b"[" + ",".join(texts).encode() + b"]"


def parse_parts(body: Body, digest: str, read: ReadSmall | None) -> Parts | None:
    """Return the parts that a manifest lists, None where it is whole. Raises ``ManifestInvalid``."""
    rows = body.optional("parts", None)
    if rows is None:
        return None
    if not isinstance(rows, list) or not 0 < len(rows) <= _MOST_RANKS:
        body.fail("has a malformed list of parts")
    hex_length = digests.hex_length(digest)
    listed = [_listed(body, row, hex_length) for row in rows]
    spreads = [_spread(body, row, len(rows)) for row in body.take("spreads", list)]
    where, step, attempt = body.where, body.whole("step"), body.take("attempt", str)
    return Parts(listed, spreads, where=where, step=step, attempt=attempt, digest=digest, read=read)


def joined_files(body: Body, files: Sequence[FileRecord], parts: Parts) -> tuple[FileRecord, ...]:
    """Return the files of a manifest that has parts: those that it lists itself, the parts, and what these describe.
    Raises ``ManifestInvalid`` where two have one name."""
    found = (*files, *parts.files())
    check_names(body, [record.name for record in found])
    return found


def _listed(body: Body, row: Any, hex_length: int) -> ListedPart:
    if not isinstance(row, list) or len(row) != 3 or not isinstance(row[1], str) or not isinstance(row[2], list):
        body.fail("has a malformed part")
    if len(row[1]) != hex_length or not all(isinstance(file, list) and len(file) == 3 for file in row[2]):
        body.fail("has a malformed part")
    files = [
        (body.file_name(name), body.size("nbytes", nbytes), body.plain_name("component name", component))
        for name, nbytes, component in row[2]
    ]
    return ListedPart(body.size("nbytes", row[0]), row[1], tuple(files))


def _spread(body: Body, row: Any, ranks: int) -> Spread:
    if not isinstance(row, list) or len(row) != 2 or not all(isinstance(one, list) for one in row):
        body.fail("has a malformed spread")
    bounds = row[0]
    if set(map(type, bounds)) != {int} or len(bounds) != len(row[1]) + 1 or not row[1]:
        body.fail("has a malformed spread")
    if bounds[0] != 0 or bounds[-1] >= 1 << 62 or any(a > b for a, b in itertools.pairwise(bounds)):
        body.fail("has a spread whose bounds do not rise from 0")
    holders = tuple((one,) if type(one) is int else one for one in row[1])
    for held in holders:
        if not isinstance(held, list | tuple) or not held:
            body.fail("has a malformed spread")
        if not all(type(rank) is int and 0 <= rank < ranks for rank in held) or len(set(held)) != len(held):
            body.fail("has a spread over ranks that it has no parts of")
    return Spread(tuple(bounds), tuple(map(tuple, holders)))
