"""The values of a checkpoint are built here with tensors that have no data yet: placeholders for what is read later."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from asyncckpt import jsontree
from asyncckpt.convert.exporting import Export
from asyncckpt.convert.stored import StoredItem, converted
from asyncckpt.errors import CheckpointDamaged, UnsupportedValue
from asyncckpt.manifest.records import StoredTensor
from asyncckpt.restore.restore import load_tensors
from asyncckpt.state.dtypes import DTYPES


class Placeholders:
    """Builds the content of the file with tensors that have no data; ``items`` says which each stands for."""

    def __init__(self, job: Export) -> None:
        self._job = job
        self._mode = FakeTensorMode()
        self.items: dict[int, StoredItem] = {}
        self._made: dict[int, torch.Tensor] = {}

    def content(self) -> Any:
        """Return what ``job.what`` means: a flat dict of weights, the state of one component, or all of them by name
        with ``step`` and ``metrics``."""
        job = self._job
        manifest = job.checkpoint.manifest
        kinds = {manifest.components[component].kind for component in job.components}
        if job.what != "all" and kinds == {"module"}:
            self._check_modules()
            return {item.name: self._tensor(item) for item in job.items}
        if job.what != "all":
            return self.state(job.components[0])
        beside = {"step": manifest.step, "metrics": dict(manifest.metrics)}
        return beside | {name: self.state(name) for name in job.components}

    def _check_modules(self) -> None:
        trees = self._job.checkpoint.trees
        losses = {name: "values in a module that are no tensors" for name in self._job.components if trees.get(name)}
        self._job.selection.check_losses(losses, self._job.checkpoint.path)

    def _tensor(self, item: StoredItem) -> torch.Tensor:
        owner = item.tied_to or item
        found = self._made.get(id(owner))
        if found is None:
            with self._mode:
                found = torch.empty(owner.shape, dtype=DTYPES[owner.dtype])
            self._made[id(owner)] = found
            self.items[id(found)] = owner
        return found

    def state(self, component: str) -> Any:
        """Return the state of one component. Raises ``CheckpointDamaged``, and ``UnsupportedValue`` where a tensor that
        is not chosen stands inside of plain values."""
        job = self._job
        checkpoint = job.checkpoint
        record = checkpoint.manifest.components[component]
        mine = {item.fqn: item for item in job.items if item.component == component}
        if record.kind == "module":
            prefix = "" if len(job.components) == 1 else f"{component}."
            return {item.name.removeprefix(prefix): self._tensor(item) for item in mine.values()}
        trees = checkpoint.trees
        if component not in trees:
            raise CheckpointDamaged(f"{checkpoint.path}: state.json lacks the component {component!r}")
        records: Mapping[str, StoredTensor] = record.tensors

        def tensor(name: str) -> torch.Tensor:
            if name not in records:
                raise _missing(checkpoint.path, name)
            item = mine.get(name)
            if item is None:
                left_out = f"{component}.{name}"
                if not job.selection.may_drop(left_out):
                    raise UnsupportedValue(
                        f"{checkpoint.path}: {left_out} stands inside plain values, which would refer to nothing "
                        f"without it; choose whole components, or --exclude '{component}*'"
                    )
                item = StoredItem(name, component, name, records[name], converted(records[name].dtype, job.dtype))
            return self._tensor(item)

        @functools.cache
        def exact() -> dict[str, torch.Tensor]:  # arrays of NumPy are data, not weights, and keep their dtype
            return load_tensors(checkpoint, [component])

        def array(name: str) -> torch.Tensor:
            if f"{component}.{name}" not in exact():
                raise _missing(checkpoint.path, name)
            return exact()[f"{component}.{name}"]

        return jsontree.decode(trees[component], tensor, array)


def _missing(path: str, name: str) -> CheckpointDamaged:
    return CheckpointDamaged(f"{path}: state.json refers to {name!r:.80}, which is not there")
