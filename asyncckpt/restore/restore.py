"""Restores live objects in place from an open checkpoint; reads only what is asked for, and verifies what it uses."""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asyncckpt.errors import CheckpointDamaged, InvalidOption, StateMismatch, UnknownName
from asyncckpt.manifest import environment
from asyncckpt.manifest.records import ComponentRecord, Manifest, StoredTensor
from asyncckpt.manifest.spread import OwnComponent
from asyncckpt.memory.gc_pause import gc_paused
from asyncckpt.read.fill import fill
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.read.scatter import Window
from asyncckpt.restore.adapters import plan_component
from asyncckpt.restore.carrying_out import Planned, Stages, typed
from asyncckpt.restore.changes import Changes
from asyncckpt.restore.other_ranks import OtherRanks
from asyncckpt.restore.plan import (
    Options,
    QualifiedRecords,
    RestorePlan,
    StoredTensors,
    asked,
    describe,
    new_tensor,
    qualified_records,
)
from asyncckpt.restore.saved_parameters import SavedParameters
from asyncckpt.restore.wrappers import StoredWrappers
from asyncckpt.state.capture import check_state
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.state.markers import without_owners
from asyncckpt.state.rank_names import rank_name, without_rank

log = logging.getLogger("asyncckpt")


Rename = Mapping[str, str] | Callable[[str], str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreReport:
    """Says what was restored. ``nbytes``: how much was read and verified. ``missing``, ``unexpected`` and
    ``mismatched`` are empty unless ``strict=False``: they list what was left as it is, by qualified name
    (``component.fqn``). ``derived``, ``dropped`` and ``saved_ranks``: see ``events.RanksChanged``. ``attempt``: the
    uuid of the save that made the checkpoint. ``whole``: every component and every tensor of a full checkpoint was
    restored, so that training goes on from its step. ``changed``: versions, and the number of ranks, that were others
    when it was saved.

    ``seconds`` is what the restore took once the checkpoint was open. Of these, ``plan_seconds`` went by until it was
    known what goes where, ``read_seconds`` while tensors were read, verified and copied, and ``load_seconds`` while
    live objects took over what is not filled in place; in a job each includes the waits for other ranks.
    ``find_seconds``, which come before, went by until a checkpoint was chosen, opened and parsed."""

    step: int
    path: str
    nbytes: int
    seconds: float
    metrics: Mapping[str, float]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    saved_ranks: int = 1
    attempt: str = ""
    whole: bool = False
    changed: tuple[str, ...] = ()
    find_seconds: float = 0.0
    plan_seconds: float = 0.0
    read_seconds: float = 0.0
    load_seconds: float = 0.0


@gc_paused()
def restore(
    checkpoint: OpenCheckpoint,
    state: Mapping[str, Any],
    *,
    strict: bool = True,
    include: str | Sequence[str] | None = None,
    rename: Rename | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    expect_digest: str | None = None,
    stages: Stages | None = None,
    changes: Changes | None = None,
) -> RestoreReport:
    """Restore the components in ``state`` from an open checkpoint, in place; see ``Run.restore``.

    ``stages``: takes each step together with the other ranks of a job, which restore this checkpoint too. ``changes``:
    what an attempt before, from another checkpoint, has changed already.
    """
    began = time.perf_counter()
    together = stages or Stages()
    changes = changes or Changes()
    with together.stage("look"), typed(checkpoint.path, "planning the restore"):
        check_state(state)
        changes.expect(state)
        state, owners = without_owners(state)
        checkpoint.require_digest(expect_digest)
        manifest, trees = checkpoint.manifest, checkpoint.trees
        if "state" in manifest.components:
            raise CheckpointDamaged(f"{checkpoint.path}: a component has a reserved name")
        selection = Selection(include)
        options = Options(
            device=torch.device(device or "cpu"),
            dtype=dtype,
            selected=selection,
            saved_ranks=manifest.world_size,
        )
        # what other ranks have of their own has names of its own, and may be in parts that this rank does not need
        named = QualifiedRecords({name: one for name, one in manifest.components.items() if not _is_others(name, one)})
        _check_rename(named, rename, checkpoint.path)
        stored = _renamed(named, rename)
        wrappers = StoredWrappers(manifest.components, trees)
        saved = SavedParameters(_of_rank(manifest, together.rank), _renamer(rename))
        plan, planned = RestorePlan(), Planned(state, changes)
        others = OtherRanks(manifest, trees, together.rank, together.size)
        for name in state:
            if selection.touches(name):
                with asked(name):
                    special = others.plan(name, state[name], options) if name not in owners else None
                if special is not None:
                    planned.add(name, special)
                    continue
                source = rank_name(name, together.rank)
                if source not in manifest.components:  # fewer ranks saved, or the component was the same on all
                    source = name
                component = manifest.components.get(source)
                mine = stored if source == name else _renamed(_under(name, source, manifest), rename)
                with asked(name):
                    found = plan_component(name, state, component, mine, trees.get(source), saved, wrappers, options)
                planned.add(name, found)
        planned.prepare()
        for found in planned.plans:
            plan.merge(found)
    # a tensor that does not live on this rank may live on another
    plan.unexpected = together.in_all(plan.unexpected)
    idle = together.in_all(selection.idle())
    with together.stage("check"), typed(checkpoint.path, "comparing it with the live state"):
        if idle:
            raise UnknownName(
                f"{checkpoint.path}: include={idle[0]!r} selects nothing of the live state. It is a prefix of "
                f"qualified names, such as 'model' or 'model.layers.0.'; of what is no module, whole "
                f"components are restored. Components of the live state: {', '.join(state)}"
            )
        if plan.missing or plan.unexpected or plan.mismatched:
            problem = describe(f"{checkpoint.path} (step {manifest.step})", plan)
            if strict:
                raise StateMismatch(problem, plan.missing, plan.unexpected, plan.mismatched)
            log.warning("%s", problem)
        changes.leave(checkpoint.path, [*plan.missing, *plan.mismatched])
    planned_at, read_before = time.perf_counter(), checkpoint.reading_seconds
    nbytes = planned.carry_out(checkpoint, together)
    read_seconds = checkpoint.reading_seconds - read_before
    load_seconds = time.perf_counter() - planned_at - read_seconds
    whole = (
        manifest.kind == "full"
        and include is None
        and not (plan.missing or plan.unexpected or plan.mismatched)
        and (stored is named or len(stored) == len(named))
        and {without_rank(name) for name in manifest.components} <= set(state)
    )
    return RestoreReport(
        step=manifest.step,
        path=checkpoint.path,
        nbytes=nbytes,
        seconds=time.perf_counter() - began,
        metrics=manifest.metrics,
        attempt=manifest.attempt,
        missing=tuple(plan.missing),
        unexpected=tuple(plan.unexpected),
        mismatched=tuple(plan.mismatched),
        derived=tuple(others.derived),
        dropped=tuple(others.dropped),
        saved_ranks=manifest.world_size,
        changed=tuple(environment.changes(manifest.environment, manifest.world_size, together.size)),
        whole=bool(together.in_all(["whole"] if whole else [])),
        plan_seconds=planned_at - began,
        read_seconds=read_seconds,
        load_seconds=load_seconds,
    )


def load_tensors(
    checkpoint: OpenCheckpoint,
    names: Sequence[str] | None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    expect_digest: str | None = None,
) -> dict[str, torch.Tensor]:
    """Read tensors into new memory, by qualified name; see ``Run.load_tensors``."""
    checkpoint.require_digest(expect_digest)
    checkpoint.check_small_files()
    manifest = checkpoint.manifest
    if names is None:
        chosen = dict(qualified_records(manifest.components))
    else:
        chosen = {}
        for name in names:
            holder = name.partition(".")[0]  # a component's name has no dots
            component = manifest.components.get(holder)
            found = dict(qualified_records({holder: component})) if component is not None else {}
            if name != holder:
                found = {key: record for key, record in found.items() if key == name or key.startswith(f"{name}.")}
            if not found and (name != holder or component is None):
                stored = [key for key, _ in qualified_records(manifest.components)]
                alike = difflib.get_close_matches(name, stored, n=1) or [next(iter(stored), "model.weight")]
                raise UnknownName(
                    f"{checkpoint.path}: no tensor or component {name!r}; components are "
                    f"{', '.join(manifest.components)}, tensors are named like {alike[0]!r}"
                )
            chosen.update(found)
    # by identity: tied names share the record, and hashing one walks over all of its chunks
    made: dict[int, tuple[StoredTensor, torch.Tensor]] = {}
    for record in chosen.values():
        if id(record) not in made:
            saved = DTYPES[record.dtype]
            target = dtype if dtype is not None and saved.is_floating_point else saved
            made[id(record)] = record, new_tensor(record, target, device)
    fill(checkpoint, [(record, [Window(tensor)]) for record, tensor in made.values()])
    return {name: made[id(record)][1] for name, record in chosen.items()}


def _is_others(name: str, component: ComponentRecord) -> bool:
    return isinstance(component, OwnComponent) and without_rank(name) != name


def _under(name: str, source: str, manifest: Manifest) -> StoredTensors:
    """Return the tensors of component ``source`` by the names they would have if it were called ``name``."""
    return QualifiedRecords({name: manifest.components[source]})


def _of_rank(manifest: Manifest, rank: int) -> dict[str, ComponentRecord]:
    """Return the components by the names that they have on this rank."""
    names = {without_rank(name) for name in manifest.components}
    found = {name: manifest.components.get(rank_name(name, rank), manifest.components.get(name)) for name in names}
    return {name: component for name, component in found.items() if component is not None}


def _renamer(rename: Rename | None) -> Callable[[str], str | None]:
    return lambda name: name if rename is None else _rename_one(name, rename)


def _renamed(stored: StoredTensors, rename: Rename | None) -> StoredTensors:
    """Return the tensors by the names that ``rename`` gives them, without those that it drops."""
    if rename is None:
        return stored
    renamed: dict[str, StoredTensor] = {}
    came_from: dict[str, str] = {}
    for name, record in stored.items():
        new = _rename_one(name, rename)
        if new is None:
            continue
        if renamed.get(new, record) is not record:
            raise InvalidOption(f"rename gives {name!r} and {came_from[new]!r} the same name, {new!r}")
        renamed[new], came_from[new] = record, name
    return renamed


def _check_rename(stored: Mapping[str, StoredTensor], rename: Rename | None, path: str) -> None:
    """Refuse an entry that renames nothing: its name is wrong, or is that of another checkpoint."""
    for old in () if rename is None or callable(rename) else rename:
        if not any(name.startswith(old) for name in stored):
            raise UnknownName(
                f"{path}: rename={{{old!r}: …}} matches no tensor there; they are named like "
                f"{next(iter(stored), 'model.weight')!r}. `asyncckpt show` lists them"
            )


def _rename_one(name: str, rename: Rename) -> str | None:
    if callable(rename):
        return rename(name)
    # the longest matching entry wins, so that an exception to a rule can stand beside the rule
    best = max((old for old in rename if name == old or name.startswith(old)), key=len, default=None)
    return name if best is None else rename[best] + name[len(best) :]


class Selection:
    """Says whether a qualified name is to be restored: where it begins with one of some prefixes, or where there are
    none. Remembers which of them have selected something."""

    def __init__(self, include: str | Sequence[str] | None) -> None:
        prefixes = (include,) if isinstance(include, str) else include
        if prefixes is not None and not all(isinstance(prefix, str) for prefix in prefixes):
            raise InvalidOption(f"include takes prefixes of qualified names, such as 'model.', not {include!r:.80}")
        self._prefixes = None if prefixes is None else tuple(prefixes)
        self._selected: set[str] = set()

    def __call__(self, name: str) -> bool:
        if self._prefixes is None:
            return True
        found = [prefix for prefix in self._prefixes if name.startswith(prefix)]
        self._selected.update(found)
        return bool(found)

    def touches(self, component: str) -> bool:
        """Return whether anything of a component may be selected."""
        whole = self(component)
        return whole or any(prefix.startswith(f"{component}.") for prefix in self._prefixes or ())

    def idle(self) -> list[str]:
        """Return the prefixes that have selected nothing yet."""
        return [prefix for prefix in self._prefixes or () if prefix not in self._selected]
