"""What the parts of a manifest say is compared with the root, and with the headers of the files that they describe."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from asyncckpt.errors import CheckpointDamaged
from asyncckpt.manifest.parts import Parts, part_name
from asyncckpt.manifest.records import FileRecord, Manifest, StoredTensor, TensorRecord
from asyncckpt.manifest.spread import OwnComponent, SpreadFile, SpreadRecord, boxes_in_each
from asyncckpt.read.damage import Damage

#: An entry of a file's header: name, dtype, shape, first byte and last.
Entry = tuple[str, str, tuple[int, ...], int, int]


def check_parts(manifest: Manifest, problem: Callable[[FileRecord, set[Entry]], str | None]) -> list[Damage]:
    """Return where the parts do not fit their root: files whose headers list other tensors, components that are not
    there, and tensors of which some row is listed by no rank or by several. ``problem``: says what is wrong with a
    file's header, which should have these entries. Reads every part, some of them several times, and every header."""
    parts = manifest.parts
    if parts is None:
        return []
    damage: list[Damage] = []
    files: defaultdict[int, list[SpreadFile]] = defaultdict(list)
    for record in manifest.files:
        if isinstance(record, SpreadFile):
            files[record.rank].append(record)
    own: defaultdict[int, list[tuple[str, OwnComponent]]] = defaultdict(list)
    for name, component in manifest.components.items():
        if isinstance(component, OwnComponent):
            own[component.rank].append((name, component))
    for rank in range(len(parts.listed)):
        try:
            expected = _entries(manifest, parts, rank)
            _check_own(parts, rank, own[rank])
            for record in files[rank]:
                wrong = problem(record, expected.get(record.name, set()))
                damage += [Damage(record.name, 0, 0, wrong)] if wrong else []
        except ValueError as error:
            damage.append(Damage(part_name(rank), 0, 0, str(error)))
    return damage or [Damage(part_name(rank), 0, 0, wrong) for rank, wrong in _untiled(manifest, parts)]


def _entries(manifest: Manifest, parts: Parts, rank: int) -> dict[str, set[Entry]]:
    """Return the entries that the headers of a rank's files should have, by file."""
    found: defaultdict[str, set[Entry]] = defaultdict(set)
    for component, tensor, row in parts.rows(rank):
        record = _tensor(manifest, component, tensor)
        if not isinstance(record, SpreadRecord):
            raise CheckpointDamaged(f"it lists {component}.{tensor:.80}, which the manifest does not spread")
        (box,) = parts.boxes_of(rank, tensor, record.dtype, [row])
        called = tensor if row[0] is None else box.entry(f"{component}.{tensor}")
        found[box.file].add((called, record.dtype, box.shape, box.begin, box.end))
    for component_record in parts.components_of(rank).values():
        for name, one in component_record.tensors.items():
            if not isinstance(one, TensorRecord):
                raise CheckpointDamaged(f"it has the tensor {name:.80} in chunks or boxes")
            found[one.file].add((name, one.dtype, one.shape, one.begin, one.end))
    return found


def _check_own(parts: Parts, rank: int, own: Sequence[tuple[str, OwnComponent]]) -> None:
    """Raise ``CheckpointDamaged`` where a part does not describe a component that the root finds there, or another."""
    for name, component in own:
        if parts.component(rank, name).kind != component.kind:
            raise CheckpointDamaged(f"it has the component {name:.80} as another kind than the manifest")
        parts.values(rank, name)


def _tensor(manifest: Manifest, component: str, tensor: str) -> StoredTensor | None:
    record = manifest.components.get(component)
    return record.tensors.get(tensor) if record is not None else None


def _untiled(manifest: Manifest, parts: Parts) -> Iterator[tuple[int, str]]:
    """Yield, with the first rank that should have them, the rows that the parts do not list exactly once. Parts are
    read one group of holders after the other, and each once where groups have few ranks."""
    tensors: defaultdict[int, list[SpreadRecord]] = defaultdict(list)
    for component in manifest.components.values():
        for tensor in () if isinstance(component, OwnComponent) else component.tensors.values():
            if isinstance(tensor, SpreadRecord):
                tensors[tensor.spread].append(tensor)
    sections = [(holders, number, at) for number in tensors for at, holders in enumerate(parts.spreads[number].holders)]
    for holders, number, at in sorted(sections):  # what the same ranks hold, one after the other
        low, high = parts.spreads[number].bounds[at : at + 2]
        try:
            boxes_in_each([(tensor, low, high) for tensor in tensors[number]])
        except CheckpointDamaged as error:
            yield holders[0], str(error)
            return
