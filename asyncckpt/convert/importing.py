"""``import_checkpoint`` turns what a ``Source`` holds into a checkpoint of a run; no format is known here."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from asyncckpt import jsontree
from asyncckpt.assets import check_names, join_assets
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.names import DEFAULT
from asyncckpt.codecs import digests
from asyncckpt.codecs.codecs import get as get_codec
from asyncckpt.commit.publication import publish, take_over
from asyncckpt.convert.selection import Selection, checked_names
from asyncckpt.convert.source import Progress, Source, SourceComponent
from asyncckpt.convert.tensors import SourceTensor, ViewTensor
from asyncckpt.errors import InvalidOption, InvalidStep, StepExists, UnsupportedValue
from asyncckpt.formats.safetensors import SafetensorsFormat
from asyncckpt.manifest import environment
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest.parse import is_component_name
from asyncckpt.manifest.records import ExtentRecord, FileRecord, Manifest, WrittenExtent
from asyncckpt.memory.buffers import aligned_buffer
from asyncckpt.plan.layout import plan
from asyncckpt.protocols import Digest, PendingDirectory, renaming
from asyncckpt.stage.image import cut_digests
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.storage import open_store
from asyncckpt.types import (
    ALIGNMENT_BYTES,
    ComponentSnapshot,
    Extent,
    JsonValue,
    Layout,
    LayoutOptions,
    LocalTensor,
    TensorSpec,
)

#: So many threads keep one device busy while others read and hash.
_THREADS = min(4, max(2, os.cpu_count() or 2))
#: Assets of a source may have so many bytes in all.
_ASSET_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Imported:
    """Tells what ``import_checkpoint`` wrote.

    ``path`` is the new checkpoint's directory, ``tensors`` their number, ``nbytes`` their files' size in bytes.
    ``components`` maps each component to its kind; ``skipped`` maps what was left behind, because the user allowed it,
    to the reason. ``notes`` say in words what the source became. ``source`` is what the checkpoint records of it.
    """

    path: str
    step: int
    tensors: int
    nbytes: int
    components: Mapping[str, str]
    skipped: Mapping[str, str]
    notes: Sequence[str]
    source: Mapping[str, JsonValue] = field(default_factory=dict)


def import_source(
    source: Source,
    run: str | os.PathLike[str],
    step: int,
    *,
    selection: Selection | None = None,
    overwrite: bool = False,
    digest: str = digests.DEFAULT,
    metrics: Mapping[str, float] | None = None,
    progress: Progress = lambda _what, _done, _total: None,
) -> Imported:
    """Write what ``source`` holds into ``run`` as ``step``; the source stays open. See ``formats.import_checkpoint``.

    Blocks until the checkpoint is durable. Tensors are read as they are written, in extents of 8 MiB."""
    if type(step) is not int or step < 0:
        raise InvalidStep(f"step must be a whole number >= 0, not {step!r}")
    selection = selection or Selection()
    take = digests.get(digest)
    skipped = selection.check_losses(source.lost, source.path)
    snapshots, tensors = _captured(source, selection)
    selection.check_used(source.path)
    if not snapshots:
        raise InvalidOption(f"{source.path}: there is nothing in it to import")
    assets = join_assets({}, source.assets, _ASSET_BYTES)
    check_names(assets)
    for check in source.checks:
        check(progress)
    files_read = source.digests("sha256" if digest == "sha256" else digests.DEFAULT, progress)
    origin: dict[str, JsonValue] = {
        "format": source.format,
        "path": os.path.abspath(source.path),
        "files": {name: dict(one) for name, one in files_read.items()},
        **({"metadata": dict(source.metadata)} if source.metadata else {}),
        **({"dropped": list(skipped)} if skipped else {}),
    }
    layout = plan(
        tuple((one.name, tuple(piece.spec for piece in one.pieces)) for one in snapshots),
        SafetensorsFormat(),
        get_codec("none", {}),
        LayoutOptions(),
    )
    writing = _Writing(snapshots, tensors, layout, assets, take, progress)
    path = writing.write(
        os.fspath(run),
        step,
        overwrite=overwrite,
        digest=digest,
        metrics=source.metrics if metrics is None else metrics,
        origin=origin,
        before=source.check_unchanged,
    )
    kinds = {one.name: one.kind for one in snapshots}
    return Imported(path, step, len(tensors), layout.nbytes, kinds, skipped, tuple(source.notes), origin)


# -- what becomes of the source's values
# ---------------------------------------------------------------------------------
def _captured(source: Source, selection: Selection) -> tuple[list[ComponentSnapshot], list[SourceTensor]]:
    """Return the components as a save has them, and the readers of their tensors, in the order of the pieces."""
    snapshots: list[ComponentSnapshot] = []
    readers: list[SourceTensor] = []
    for component in source.components:
        if not is_component_name(component.name):
            raise InvalidOption(
                f"{source.path}: {component.name!r:.80} is no name for a component (letters, digits and _=+-); leave "
                f"it behind with --exclude, or import the file's parts one by one"
            )
        capture = _module if component.kind == "module" else _values
        snapshot, mine = capture(component, selection, source.path)
        if snapshot is not None:
            snapshots.append(snapshot)
            readers += mine
    return snapshots, readers


def _module(
    component: SourceComponent, selection: Selection, where: str
) -> tuple[ComponentSnapshot | None, list[SourceTensor]]:
    chosen: dict[str, SourceTensor] = {}
    extra: dict[str, Any] = {}
    pairs: list[tuple[str, str]] = []
    for name, value in component.value.items():
        if not selection.takes(component.name, name):
            continue
        new = selection.renamed(name)
        pairs.append((name, new))
        if isinstance(value, SourceTensor):
            chosen[new] = value
        else:
            extra[new] = value
    checked_names(pairs, where)
    if not pairs and component.value:
        return None, []
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    pieces, readers = [], []
    for name, tensor in chosen.items():
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            aliases[name] = owner
            continue
        pieces.append(LocalTensor(_spec(name, tensor, component.file), _placeholder(tensor)))
        readers.append(tensor)
    tree = jsontree.encode(extra, "", _refuse, component=component.name)
    return ComponentSnapshot(component.name, "module", pieces, aliases, tree), readers


def _values(
    component: SourceComponent, selection: Selection, where: str
) -> tuple[ComponentSnapshot | None, list[SourceTensor]]:
    by_id: dict[int, SourceTensor] = {}
    kept: list[torch.Tensor] = []  # the ids are keys for as long as these live
    walk = _Walk(component, selection, where, by_id, kept)
    if not selection.takes(component.name, ""):
        wanted = walk.chosen(component.value, ())
        if not kept:  # a component of values alone is chosen by its own name
            return None, []
    else:
        wanted = walk.chosen(component.value, ())
    pieces: list[LocalTensor] = []
    readers: list[SourceTensor] = []

    def sink(name: str, tensor: torch.Tensor) -> None:
        reader = by_id.get(id(tensor)) or ViewTensor(tensor)  # that of an array, which is in memory already
        pieces.append(LocalTensor(_spec(name, reader), tensor))
        readers.append(reader)

    tree = jsontree.encode(wanted, "", sink, component=component.name)
    return ComponentSnapshot(component.name, component.kind, pieces, {}, tree), readers


class _Walk:
    """Walks through the values of a component, and puts placeholders in the place of the tensors that are chosen."""

    def __init__(
        self,
        component: SourceComponent,
        selection: Selection,
        where: str,
        by_id: dict[int, SourceTensor],
        kept: list[torch.Tensor],
    ) -> None:
        self._component = component
        self._selection = selection
        self._where = where
        self._by_id = by_id
        self._kept = kept

    def chosen(self, value: Any, keys: tuple[str, ...]) -> Any:
        if isinstance(value, SourceTensor):
            placeholder = _placeholder(value)
            self._by_id[id(placeholder)] = value
            self._kept.append(placeholder)
            return placeholder
        if isinstance(value, Mapping):
            items = [(key, item) for key, item in value.items() if self._takes(item, (*keys, str(key)))]
            made = {self._key(key, keys): self.chosen(item, (*keys, str(key))) for key, item in items}
            if self._is_params(keys):
                checked_names(((str(key), str(self._key(key, keys))) for key, _ in items), self._where)
            kind: Any = type(value)
            return made if kind is dict else kind(made)
        if isinstance(value, list | tuple):
            if self._is_params(keys) and keys[0] == "param_groups":
                return [self._selection.renamed(name) for name in value]
            found = []
            for number, item in enumerate(value):
                if not self._takes(item, (*keys, str(number))):
                    raise InvalidOption(
                        f"{self._where}: {'.'.join((self._component.name, *keys, str(number)))} is an item of a list, "
                        f"which cannot be left out alone; choose the whole list"
                    )
                found.append(self.chosen(item, (*keys, str(number))))
            return found if isinstance(value, list) else tuple(found)
        return value

    def _takes(self, item: Any, keys: tuple[str, ...]) -> bool:
        return not isinstance(item, SourceTensor) or self._selection.takes(self._component.name, ".".join(keys))

    def _is_params(self, keys: tuple[str, ...]) -> bool:
        """Whether what lies at ``keys`` is keyed by, or lists, the names of an optimizer's parameters."""
        if self._component.kind != "optimizer":
            return False
        return keys == ("state",) or (len(keys) == 3 and keys[0] == "param_groups" and keys[2] == "params")

    def _key(self, key: Any, keys: tuple[str, ...]) -> Any:
        return self._selection.renamed(key) if isinstance(key, str) and self._is_params(keys) else key


def _spec(name: str, tensor: SourceTensor, file: str = "") -> TensorSpec:
    return TensorSpec(name, tensor.dtype, tensor.shape, tensor.nbytes, file=file)


def _placeholder(tensor: SourceTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")


def _refuse(name: str, _tensor: object) -> None:
    raise UnsupportedValue(f"{name}: a tensor inside a plain value")


# -- writing
# -------------------------------------------------------------------------------------------------------------
@dataclass
class _Writing:
    """Writes one checkpoint: ``tensors[i]`` is read for piece ``i`` of the layout."""

    snapshots: Sequence[ComponentSnapshot]
    tensors: Sequence[SourceTensor]
    layout: Layout
    assets: Mapping[str, bytes]
    take: Digest
    progress: Progress

    def write(
        self,
        run: str,
        step: int,
        *,
        overwrite: bool,
        digest: str,
        metrics: Mapping[str, float],
        origin: dict[str, JsonValue],
        before: Callable[[], None],
    ) -> str:
        store = open_store(run)
        name = DEFAULT.format(step=step)
        if store.listing(name) and not overwrite:
            raise StepExists(f"{store.address}/{name} already exists; import as another step, or pass overwrite=True")
        catalog = Catalog(store, store.address)
        hold = take_over(store, create_parents=True)
        directory: PendingDirectory | None = None
        try:
            mover = renaming(store)
            if catalog.must_be_kept(name) and mover is not None:
                mover.set_aside(name)
            directory = store.begin(step, uuid.uuid4().hex, name=name)
            files = self._write_shards(directory)
            small = {manifests.STATE_FILE: jsontree.dumps({one.name: one.tree for one in self.snapshots})}
            small |= self._small_files() | dict(self.assets)
            directory.write_small(small)
            draft = Manifest(
                step=step,
                name=name,
                attempt=directory.uuid,
                kind="full",
                created_unix_seconds=time.time(),
                world_size=1,
                shard_format="safetensors",
                digest=digest,
                layout=self.layout.fingerprint,
                metrics=metrics,
                config=None,
                environment={**environment.record(), "imported": origin},
                files=(*files, *(manifests.whole_file(file, body, self.take) for file, body in small.items())),
                components={},
                least_version=manifests.version_of_values(small[manifests.STATE_FILE], None),
                sequence=1 + max((entry.sequence for entry in catalog.entries(fresh=False)), default=0),
                assets=tuple(self.assets),
            )

            def check() -> None:
                before()
                hold.check()

            publish(directory, draft, components_json=self._components(), replace=overwrite, before=check)
        except BaseException:
            if directory is not None:
                directory.discard()
            raise
        finally:
            hold.release()
        return f"{store.address}/{name}"

    def _components(self) -> bytes:
        kinds = {one.name: one.kind for one in self.snapshots}
        aliases = {one.name: one.aliases for one in self.snapshots}
        described = {one.name: manifests.describe(one) for one in self.snapshots}
        orders = {shard.file: range(len(shard.extents)) for shard in self.layout.shards}
        return jsontree.dumps(manifests.components_of(self.layout, kinds, aliases, described, orders))

    def _small_files(self) -> dict[str, bytes]:
        shape, none = SafetensorsFormat(), get_codec("none", {})
        found: dict[str, bytes] = {}
        for one in self.snapshots:
            shards = [shard for shard in self.layout.shards if shard.component == one.name]
            found |= shape.small_files(one.name, shards, none) if shards else {}
        modules = [one.name for one in self.snapshots if one.kind == "module"]
        indexed = "model" if "model" in modules else modules[0] if len(modules) == 1 else None
        return found | shape.root_files([s for s in self.layout.shards if s.component == indexed], self.assets)

    def _write_shards(self, directory: PendingDirectory) -> list[FileRecord]:
        shards = self.layout.shards
        writers = [directory.create_shard(shard.file, shard.nbytes) for shard in shards]
        largest = max((extent.nbytes for shard in shards for extent in shard.extents), default=0)
        local, lock, done = threading.local(), threading.Lock(), [0]

        def one(extent: Extent) -> list[ExtentRecord]:
            buffer: memoryview | None = getattr(local, "buffer", None)
            if buffer is None:
                buffer = local.buffer = memoryview(aligned_buffer(largest + 2 * ALIGNMENT_BYTES))
            first = extent.offset % ALIGNMENT_BYTES
            view = buffer[first : first + extent.nbytes]
            self._read(extent, view)
            written = WrittenExtent(
                extent.offset, extent.nbytes, cut_digests(self.take, view, extent.digest_boundaries)
            )
            writers[extent.shard].write_at(buffer[first:], extent.nbytes, extent.offset)
            with lock:
                done[0] += extent.nbytes
                self.progress("writing", done[0], self.layout.nbytes)
            return written.records(extent.digest_boundaries)

        try:
            with ThreadPoolExecutor(_THREADS, "asyncckpt-import") as pool:
                waiting = [[pool.submit(one, extent) for extent in shard.extents] for shard in shards]
                try:
                    records = [[part for future in futures for part in future.result()] for futures in waiting]
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
            for writer, shard in zip(writers, shards, strict=True):
                writer.finish(shard.nbytes)
        except BaseException:
            for writer in writers:
                writer.abort()
            raise
        directory.sync_directory()
        return [
            FileRecord(shard.file, shard.nbytes, tuple(found)) for shard, found in zip(shards, records, strict=True)
        ]

    def _read(self, extent: Extent, view: memoryview) -> None:
        """Fill ``view`` with the bytes of an extent: its header, parts of tensors, and zeros between and after them."""
        view[: len(extent.header)] = extent.header
        at = len(extent.header)
        for segment in sorted(extent.segments, key=lambda one: one.extent_offset):
            if segment.extent_offset > at:
                view[at : segment.extent_offset] = bytes(segment.extent_offset - at)
            at = segment.extent_offset + segment.nbytes
            self.tensors[segment.piece].read_into(segment.source_offset, view[segment.extent_offset : at])
        if at < extent.nbytes:
            view[at:] = bytes(extent.nbytes - at)


def renamed_source(source: Source, component: str) -> Source:
    """Return the source with its only module under another component's name. Raises ``InvalidOption`` where it has
    several."""
    modules = [one for one in source.components if one.kind == "module"]
    if len(modules) != 1:
        raise InvalidOption(f"{source.path}: it has {len(modules)} modules, so --component cannot name them")
    modules[0] = dataclasses.replace(modules[0], name=component)
    source.components = [modules[0] if one.kind == "module" else one for one in source.components]
    return source
