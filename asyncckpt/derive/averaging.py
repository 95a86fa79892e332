"""``average`` makes one checkpoint of several: the weights' mean, a weighted mean, or an exponential moving average."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from asyncckpt import jsontree
from asyncckpt.catalog.names import DEFAULT, another, checked_names
from asyncckpt.codecs import digests
from asyncckpt.codecs.codecs import get as get_codec
from asyncckpt.commit.publication import publish, take_over
from asyncckpt.commit.room import make_room
from asyncckpt.derive.blend import Blend, accumulator_of, ema_weights, fractions_of
from asyncckpt.derive.writing import Scratch, Stretch, write_shards
from asyncckpt.errors import CheckpointNotFound, InvalidOption, RunLocked, StateMismatch, storage_errors
from asyncckpt.formats.safetensors import SafetensorsFormat
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.component_rows import components_of, describe
from asyncckpt.manifest.draft import finished_draft
from asyncckpt.manifest.pieces import dumps_in_pieces
from asyncckpt.manifest.records import ComponentRecord, Manifest, StoredTensor, TensorRecord
from asyncckpt.plan.layout import plan
from asyncckpt.protocols import Store
from asyncckpt.read.extents import read_here
from asyncckpt.read.fill import fill
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.read.scatter import Window
from asyncckpt.run import Run
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.storage import open_store
from asyncckpt.types import JsonValue, Layout, LayoutOptions, TensorSpec

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors\Z")
#: The values of so many checkpoints are read before they are blended.
_AT_ONCE = 4
#: So many differences between checkpoints are named.
_SHOWN = 5

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Averaged:
    """Tells what ``average`` wrote: the checkpoint's directory name and ``path``, its ``step`` (that of the newest one
    in it), its size ``nbytes`` in bytes, and the steps it was made of with the weight of each, the oldest first."""

    name: str
    path: str
    step: int
    nbytes: int
    weights: tuple[tuple[int, float], ...]


def average(
    run: str | os.PathLike[str],
    steps: Sequence[int | str] = (),
    *,
    last: int | None = None,
    weights: Sequence[float] = (),
    decay: float | None = None,
    components: Sequence[str] = (),
    to: str | os.PathLike[str] | None = None,
    name: str | Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Averaged:
    """Average the weights of checkpoints of a run, and publish the result as a weights-only checkpoint of its own.

    ``steps``: which, two or more; or ``last``: so many of the newest full ones on training's line (weights-only ones in
    a run that has no full one). All count the same; or as ``weights`` says, one number > 0 for each of ``steps``; or,
    with ``decay``, as an exponential moving average that begins at the oldest: each later one moves it by ``1 -
    decay``. ``components``: which to average (default: every module). ``to``: another run directory for the result,
    which a writer of ``run`` does not stand in the way of. ``name``: names for the result, as in ``save``.

    Floating values are added up in float32 (float64 and complex ones in their own dtype) and stored in the dtype that
    they have; equal values stay what they are to the bit. Whole numbers, truth values, plain values, config and assets
    are the newest one's; it has no metrics of its own, see ``Run.annotate``. Every byte read is verified. Tensors are
    read and written in windows of 8 MiB, several at a time, as plain safetensors. The manifest's ``derived`` names
    what it was made of. It is published as a save is: whole or not at all, durable. ``resume`` never takes it,
    retention never deletes it.

    Blocks. ``progress(done_bytes, total_bytes)``: of tensors, called on several threads. Raises ``InvalidOption``,
    ``StateMismatch`` (names, shapes or dtypes differ), ``CheckpointNotFound``, ``CheckpointDamaged``, ``RunLocked``,
    ``NotEnoughSpace``, ``StorageFailed`` and ``RunPathError``."""
    names = checked_names(name)
    reading = Run(run)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(one) for one in _open(reading, steps, last)]
        if len({one.manifest.attempt for one in opened}) < len(opened):
            raise InvalidOption(f"{reading.path}: a checkpoint is given twice; each counts once, by its weight")
        sources = sorted(opened, key=lambda one: (one.manifest.sequence, one.manifest.step))
        counts = _weights([opened.index(one) for one in sources], weights, decay)
        shares = [count / sum(counts) for count in counts]
        method = "ema" if decay is not None else "weighted" if len(weights) else "uniform"
        derived = _derived(sources, shares, {"method": method} | ({} if decay is None else {"decay": decay}))
        work = _Work(sources, _components(sources, components), fractions_of(counts), progress)
        store = open_store(reading.path if to is None else to)
        with storage_errors(store.address):
            try:
                held = take_over(store)
            except RunLocked as error:
                hint = ". To average beside a run that is being written, give the result another directory: to=…, --to"
                raise RunLocked(f"{error}{hint}" if to is None else str(error)) from error
            try:
                manifest = work.write(store, held.check, derived, names)
            finally:
                held.release()
    rows = tuple((source.manifest.step, share) for source, share in zip(sources, shares, strict=True))
    return Averaged(manifest.name, f"{store.address}/{manifest.name}", manifest.step, manifest.nbytes, rows)


def _open(run: Run, steps: Sequence[int | str], last: int | None) -> Iterator[OpenCheckpoint]:
    """Open the checkpoints to average, one after the other, in the order given; with ``last`` the oldest first."""
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        raise InvalidOption(f"steps must be a list of steps or names, not {steps!r:.80}")
    if bool(len(steps)) == (last is not None):
        raise InvalidOption("say which checkpoints to average: two or more steps, or last=K; not both")
    if last is None:
        if len(steps) < 2:
            raise InvalidOption("give two or more steps to average, or last=K")
        yield from (run.open(step) for step in steps)
        return
    if type(last) is not int or last < 2:
        raise InvalidOption(f"last must be a whole number >= 2, not {last!r}")
    own = [e for e in run.ls() if e.damage is None and not (e.renamed or e.beside or e.abandoned)]
    full = [entry for entry in own if entry.kind == "full"] or own
    if len(full) < last:
        there = ", ".join(str(entry.step) for entry in full) or "none"
        raise CheckpointNotFound(f"{run.path}: last={last}, and there are {len(full)} to average (steps: {there})")
    yield from (run.open_entry(entry) for entry in full[-last:])


def _weights(order: Sequence[int], weights: Sequence[float], decay: float | None) -> list[float]:
    """Return the weights of the checkpoints, the oldest first. ``order``: as which each of them was given."""
    if len(weights) and decay is not None:
        raise InvalidOption("give weights, or decay for an exponential moving average; not both")
    if decay is not None:
        return ema_weights(len(order), decay)
    if not len(weights):
        return [1.0] * len(order)
    if len(weights) != len(order):
        raise InvalidOption(f"{len(weights)} weights for {len(order)} checkpoints: give one for each")
    fractions_of(weights)
    return [float(weights[place]) for place in order]


def _derived(
    sources: Sequence[OpenCheckpoint], shares: Sequence[float], method: Mapping[str, JsonValue]
) -> dict[str, JsonValue]:
    """Return what the manifest says of where the average comes from."""
    rows: list[JsonValue] = [
        {"attempt": one.manifest.attempt, "step": one.manifest.step, "name": one.manifest.name, "weight": share}
        for one, share in zip(sources, shares, strict=True)
    ]
    return {"by": "average", "from": rows, **method}


def _components(sources: Sequence[OpenCheckpoint], wanted: Sequence[str]) -> dict[str, ComponentRecord]:
    """Return the components to average, as the newest has them. Raises ``StateMismatch`` where another one has other
    tensors."""
    newest = sources[-1].manifest.components
    chosen = tuple(wanted) or tuple(name for name, record in newest.items() if record.kind == "module")
    if not chosen or not all(newest[name].tensors for name in chosen if name in newest):
        raise InvalidOption(
            f"{sources[-1].path} has no module to average, but: {', '.join(newest)}. Name those to average: "
            f"components=[…], --component"
        )
    differences: list[str] = []
    for source in sources:
        components = source.manifest.components
        for name in chosen:
            if name not in components:
                differences.append(f"{source.path} has no component {name!r}, but: {', '.join(components)}")
            elif name in newest:
                differences += _differences(source.path, name, components[name], newest[name])
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise StateMismatch(
            f"these checkpoints cannot be averaged: {'; '.join(differences[:_SHOWN])}{more}. Average "
            f"checkpoints of one model, or the components that are equal in all"
        )
    return {name: newest[name] for name in chosen}


def _differences(path: str, component: str, one: ComponentRecord, newest: ComponentRecord) -> Iterator[str]:
    for name in sorted(one.tensors.keys() | newest.tensors.keys()):
        shapes = [
            f"{record.dtype}{list(record.shape)}" if record is not None else "none"
            for record in (one.tensors.get(name), newest.tensors.get(name))
        ]
        if shapes[0] != shapes[1]:
            yield f"{path}: {component}.{name} is {shapes[0]}, and {shapes[1]} in the newest"
    if dict(one.aliases) != dict(newest.aliases):
        yield f"{path}: other tensors of {component} are tied than in the newest"


class _Work:
    """Writes the blend of some components of ``sources``, which come with the oldest first."""

    def __init__(
        self,
        sources: Sequence[OpenCheckpoint],
        components: Mapping[str, ComponentRecord],
        fractions: Sequence[float],
        progress: Progress | None,
    ) -> None:
        self._sources = sources
        self._components = components
        self._fractions = fractions
        self._progress = progress
        self._lock = threading.Lock()
        self._done_bytes = 0
        specs = tuple((name, tuple(_specs(name, record))) for name, record in components.items())
        self._layout = plan(specs, SafetensorsFormat(), get_codec("none", {}), LayoutOptions())
        #: By piece, the stored tensor of each source.
        self._tensors: list[list[StoredTensor]] = [
            [source.manifest.components[name].tensors[spec.name] for source in sources]
            for name, pieces in specs
            for spec in pieces
        ]
        floats = sum(t[0].nbytes * len(t) for t in self._tensors if accumulator_of(DTYPES[t[0].dtype]) is not None)
        self._total_bytes = floats + sum(
            t[-1].nbytes for t in self._tensors if accumulator_of(DTYPES[t[0].dtype]) is None
        )

    def write(
        self, store: Store, check: Callable[[], None], derived: Mapping[str, JsonValue], names: Sequence[str]
    ) -> Manifest:
        """Write and publish the checkpoint in the run that is held; return its manifest."""
        newest, layout = self._sources[-1], self._layout
        assets = newest.assets()
        make_room(store, layout.nbytes + sum(map(len, assets.values())), newest.manifest.step, 0, lambda: None)
        taken = set(store.names())
        base = f"average-{DEFAULT.format(step=newest.manifest.step)}"
        name = next(free for number in count(1) if (free := another(base, number)) not in taken)
        directory = store.begin(newest.manifest.step, uuid.uuid4().hex, name=name)
        try:
            files = write_shards(directory, layout.shards, self._blend, digests.get(newest.manifest.digest))
            small = self._small_files(assets)
            directory.write_small(small)
            draft = finished_draft(
                files,
                small,
                step=newest.manifest.step,
                name=name,
                attempt=directory.uuid,
                kind="weights",
                digest=newest.manifest.digest,
                layout=layout.fingerprint,
                sequence=newest.manifest.sequence,
                config=newest.manifest.config,
                names=names,
                assets=assets,
                derived=derived,
            )
            return publish(
                directory,
                draft,
                components_json=_components_json(layout, self._components),
                replace=False,
                before=check,
            )
        except BaseException:
            directory.discard()
            raise

    def _small_files(self, assets: Mapping[str, bytes]) -> dict[str, bytes]:
        trees = {name: tree for name, tree in self._sources[-1].trees.items() if name in self._components}
        indexed = "model" if "model" in self._components else next(iter(self._components))
        if indexed != "model" and len(self._components) > 1:
            indexed = ""
        shards = [shard for shard in self._layout.shards if shard.component == indexed]
        small = {manifests.STATE_FILE: jsontree.dumps(trees)} | SafetensorsFormat().root_files(shards, assets)
        return small | dict(assets)

    def _blend(self, stretches: Sequence[Stretch], scratch: Scratch) -> None:
        """Make the bytes of each stretch from those of all sources."""
        floats: list[tuple[Stretch, Blend]] = []
        plain: list[tuple[StoredTensor, list[Window]]] = []
        for stretch in stretches:
            dtype = DTYPES[self._tensors[stretch.piece][0].dtype]
            out, wide = stretch.out.view(dtype), accumulator_of(dtype)
            if wide is None:
                window = Window(out, stretch.begin // dtype.itemsize)
                plain.append((self._tensors[stretch.piece][-1], [window]))
            elif wide == dtype:
                floats.append((stretch, Blend(out, out)))
            elif len(self._sources) <= _AT_ONCE:
                floats.append((stretch, Blend(out, None)))
            else:
                floats.append((stretch, Blend(out, scratch.tensor(out.numel(), wide))))
        space = [
            [scratch.tensor(stretch.nbytes, torch.uint8) for stretch, _ in floats]
            for _ in range(min(_AT_ONCE, len(self._sources)))
        ]
        for first in range(0, len(self._sources), _AT_ONCE):
            numbers = range(first, min(first + _AT_ONCE, len(self._sources)))
            for number, memory in zip(numbers, space, strict=False):
                wanted = [self._wanted(s, number, m) for (s, _), m in zip(floats, memory, strict=True)]
                self._read(number, wanted, scratch)
            fractions = self._fractions[first : first + len(numbers)]
            for place, (stretch, blend) in enumerate(floats):
                dtype = DTYPES[self._tensors[stretch.piece][0].dtype]
                blend.add([space[row][place].view(dtype) for row in range(len(numbers))], fractions)
        self._read(len(self._sources) - 1, plain, scratch)

    def _wanted(self, stretch: Stretch, number: int, memory: torch.Tensor) -> tuple[StoredTensor, list[Window]]:
        """Say what to read of a source for a stretch, and into what."""
        tensor = self._tensors[stretch.piece][number]
        values = memory.view(DTYPES[tensor.dtype])
        return tensor, [Window(values, stretch.begin // values.itemsize)]

    def _read(self, number: int, wanted: Sequence[tuple[StoredTensor, list[Window]]], scratch: Scratch) -> None:
        if not wanted:
            return
        fill(self._sources[number], wanted, read=read_here(scratch.reading))
        if self._progress is not None:
            with self._lock:
                self._done_bytes += sum(windows[0].tensor.nbytes for _, windows in wanted)
                self._progress(self._done_bytes, self._total_bytes)


def _specs(component: str, record: ComponentRecord) -> Iterator[TensorSpec]:
    """Yield a specification of each tensor; one that lies in a file that another library looks for stays in it."""
    for name, tensor in record.tensors.items():
        file = tensor.file if isinstance(tensor, TensorRecord) else ""
        apart = file.endswith(".safetensors") and not _SHARD.search(file)
        yield TensorSpec(name, tensor.dtype, tensor.shape, tensor.nbytes, file=file if apart else "")


def _components_json(layout: Layout, components: Mapping[str, ComponentRecord]) -> bytes:
    kinds = {name: record.kind for name, record in components.items()}
    aliases = {name: record.aliases for name, record in components.items()}
    described = {name: describe(record) for name, record in components.items()}
    return dumps_in_pieces(components_of(layout, kinds, aliases, described, {}))
