"""``import_checkpoint`` turns what a ``Source`` holds into a checkpoint of a run; no format is known here."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from asyncckpt import jsontree
from asyncckpt.assets import check_names, join_assets
from asyncckpt.codecs import digests
from asyncckpt.codecs.codecs import get as get_codec
from asyncckpt.convert.checkpoint_writing import CheckpointWriting
from asyncckpt.convert.selection import Selection, checked_names
from asyncckpt.convert.source import Progress, Source, SourceComponent
from asyncckpt.convert.tensors import SourceTensor, ViewTensor
from asyncckpt.errors import InvalidOption, InvalidStep, UnsupportedValue
from asyncckpt.formats.safetensors import SafetensorsFormat
from asyncckpt.manifest.parse import is_component_name
from asyncckpt.plan.layout import plan
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.types import (
    ComponentSnapshot,
    JsonValue,
    LayoutOptions,
    LocalTensor,
    TensorSpec,
)

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

    layout = plan(
        tuple((one.name, tuple(piece.spec for piece in one.pieces)) for one in snapshots),
        SafetensorsFormat(),
        get_codec("none", {}),
        LayoutOptions(),
    )
    writing = CheckpointWriting(snapshots, tensors, layout, assets, take, progress)
    # beside the writing, which reads the same bytes: whatever it finds is known before anything is published
    with ThreadPoolExecutor(1, "asyncckpt-source") as beside, contextlib.ExitStack() as stack:
        origin = beside.submit(source.record, digest, progress, skipped)
        stack.callback(source.give_up)

        def recorded() -> dict[str, JsonValue]:
            source.nothing_more_is_read()
            return origin.result()

        path = writing.write(
            os.fspath(run),
            step,
            overwrite=overwrite,
            digest=digest,
            metrics=source.metrics if metrics is None else metrics,
            origin=recorded,
            before=source.check_unchanged,
        )
    kinds = {one.name: one.kind for one in snapshots}
    return Imported(path, step, len(tensors), layout.nbytes, kinds, skipped, tuple(source.notes), origin.result())


# -- what becomes of the source's values -------------------------------------------------------------------------------
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


def renamed_source(source: Source, component: str) -> Source:
    """Return the source with its only module under another component's name. Raises ``InvalidOption`` where it has
    several."""
    modules = [one for one in source.components if one.kind == "module"]
    if len(modules) != 1:
        raise InvalidOption(f"{source.path}: it has {len(modules)} modules, so --component cannot name them")
    modules[0] = dataclasses.replace(modules[0], name=component)
    source.components = [modules[0] if one.kind == "module" else one for one in source.components]
    return source
