"""``check_trace`` runs the real recovery on crash states, and says which promises they break.

The promises: what was acknowledged is there and holds the bytes that were saved, unless retention took it and something
newer is there; what is visible is whole, verifies, and is one of the things that were saved; a restore finds the newest
of them; and the next run's clearing up changes nothing that is visible.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.catalog.retention import Policy, plan
from asyncckpt.errors import AsyncCkptError, CheckpointNotFound
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.run import Run
from asyncckpt.storage.local import DAMAGED_PREFIX, REPLACED_PREFIX, TRASH_PREFIX, LocalStore
from asyncckpt.testing.crashes import CrashModel, Tree
from asyncckpt.testing.memory import MemoryOps
from asyncckpt.testing.recording import Trace

#: A save is a step and a version, because a step may be saved more than once.
Saved = tuple[int, int]
_STEP = re.compile(r"step~(\d{8})")


@dataclass(frozen=True, slots=True)
class Recovered:
    """Holds what recovery found. ``good`` says which saves the checkpoints that verify hold, ``bad`` names what is
    visible and not whole, and ``restored`` is the step that a restore gave, or None where there was nothing to
    restore."""

    good: frozenset[Saved]
    bad: tuple[str, ...]
    restored: int | None


@dataclass(slots=True)
class Outcome:
    """Sums up a check. After ``cuts`` cuts, ``states`` crash states were covered by ``walked`` trees that were walked
    one by one; recovery ran on each of the ``trees`` different ones. ``violations`` are the first few broken promises,
    in words."""

    cuts: int = 0
    states: int = 0
    walked: int = 0
    trees: int = 0
    violations: list[str] = field(default_factory=list)
    sampled: bool = False

    def __str__(self) -> str:
        return (
            f"{self.states:,} crash states after {self.cuts:,} cuts; {self.walked:,} trees walked, {self.trees:,} "
            f"different; {len(self.violations)} broken promises"
        )


class Recovery:
    """Runs recovery on trees of one model. ``identify`` says which save's exact content an open checkpoint holds, or
    None. ``restore`` restores the newest checkpoint and returns its step."""

    def __init__(
        self,
        model: CrashModel,
        run_name: str,
        identify: Callable[[OpenCheckpoint, int], Saved | None],
        restore: Callable[[Run], int],
        policies: Sequence[Policy] = (),
    ) -> None:
        self.model = model
        self._run_name = run_name
        self._identify = identify
        self._restore = restore
        self._policies = policies
        self._known: dict[Tree, Recovered] = {}
        self._checkpoints: dict[tuple[str, Tree], Saved | str] = {}

    @property
    def trees(self) -> int:
        """Return the number of different trees that recovery ran on."""
        return len(self._known)

    def of(self, tree: Tree) -> Recovered:
        """Recover from this tree, or return what was found when an equal one came before."""
        known = self._known.get(tree)
        if known is None:
            known = self._known[tree] = self._recover(tree)
        return known

    def _recover(self, tree: Tree) -> Recovered:
        items = self.model.items(tree)
        ops = MemoryOps(items)
        store = LocalStore(f"/{self._run_name}", ops=ops, direct=False)
        run = Run(store.path, store=store)
        if any(name.startswith(REPLACED_PREFIX) for name in store.listing("")):
            # a step was being saved again after going back: whoever opens the run decides which of the two is there
            store.reclaim()
            Catalog(store, run.path).settle_replaced()
        good: set[Saved] = set()
        bad: list[str] = []
        usable: list[CheckpointInfo] = []
        for entry in run.ls():
            inside = f"{self._run_name}/{entry.name}"
            subtree = tuple(item for item in tree if item[0].startswith(inside))
            found = self._checkpoints.get((entry.name, subtree))
            if found is None:
                found = self._checkpoints[entry.name, subtree] = self._look(run, entry)
            if isinstance(found, str):
                bad.append(f"{entry.name}: {found}")
            else:
                good.add(found)
                usable.append(entry)
        to_delete = plan([entry for entry in usable if entry.kind == "full"], self._policies)
        if usable and usable[-1] in to_delete:
            bad.append(f"{usable[-1].name}: retention would take the newest")
        restored = self._restored(run, bad)
        if not any(path == self._run_name for path, _ in tree):
            return Recovered(frozenset(good), tuple(bad), restored)
        before = self._visible(ops)
        store.reclaim()
        if self._visible(ops) != before:
            bad.append("clearing up changed what is visible")
        if any(name.startswith((".tmp-", TRASH_PREFIX, REPLACED_PREFIX)) for name in store.listing("")):
            bad.append("clearing up left something behind")
        return Recovered(frozenset(good), tuple(bad), restored)

    def _look(self, run: Run, entry: CheckpointInfo) -> Saved | str:
        if entry.damage is not None:
            return f"visible and not whole: {entry.damage}"
        damage = run.verify_entry(entry)
        if damage:
            return f"listed as whole and does not verify: {damage[0]}"
        with run.open_entry(entry) as checkpoint:
            found = self._identify(checkpoint, entry.step)
        return found if found is not None else "verifies and holds something that was never saved"

    def _restored(self, run: Run, bad: list[str]) -> int | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return self._restore(run)
            except CheckpointNotFound:
                return None
            except AsyncCkptError as error:
                bad.append(f"restore refused everything: {error}")
                return None

    def _visible(self, ops: MemoryOps) -> list[tuple[str, bytes | None]]:
        hidden = tuple(f"{self._run_name}/{prefix}" for prefix in (".tmp-", TRASH_PREFIX))
        return [item for item in ops.walk() if not item[0].startswith(hidden)]


@dataclass(frozen=True, slots=True)
class _Promises:
    """Holds what a trace acknowledged and gave up, as bit masks of its events."""

    acknowledged: Mapping[int, Saved]
    retired: Mapping[int, int]

    @classmethod
    def of(cls, trace: Trace) -> _Promises:
        acknowledged: dict[int, Saved] = {}
        retired: dict[int, int] = {}
        for number, event in enumerate(trace.events):
            if event.kind == "mark" and event.path == "acknowledged":
                acknowledged[number] = (event.value[0], event.value[1])
            name = os.path.basename(event.target)
            if event.kind == "rename" and name.startswith((TRASH_PREFIX, DAMAGED_PREFIX)):
                match = _STEP.search(name)
                if match is not None:
                    retired[number] = int(match.group(1))
        return cls(acknowledged, retired)


def check_trace(recovery: Recovery, *, most_violations: int = 20) -> Outcome:
    """Walk every crash state of the model's trace and recover from each. It ends early where ``most_violations``
    different promises were broken."""
    outcome, model = Outcome(), recovery.model
    promises = _Promises.of(model.trace)
    marks = sum(1 << number for number in (*promises.acknowledged, *promises.retired))
    judged: dict[tuple[int, Tree], str | None] = {}
    for cut in model.trace.cuts():
        outcome.cuts += 1
        decided = cut & marks
        for states, tree in model.states(cut):
            outcome.states += states
            outcome.walked += 1
            key = decided, tree
            if key not in judged:
                problem = judged[key] = _judge(recovery.of(tree), promises, decided)
                if problem is not None and problem not in outcome.violations:
                    outcome.violations.append(problem)
            if len(outcome.violations) >= most_violations:
                break
        if len(outcome.violations) >= most_violations:
            break
    outcome.trees = recovery.trees
    outcome.sampled = model.sampled
    return outcome


def _judge(found: Recovered, promises: _Promises, decided: int) -> str | None:
    if found.bad:
        return found.bad[0]
    acknowledged = [saved for number, saved in promises.acknowledged.items() if decided >> number & 1]
    retired = {step for number, step in promises.retired.items() if decided >> number & 1}
    newest = acknowledged[-1] if acknowledged else None  # whatever its step, as training may have gone back
    there = dict(sorted(found.good))
    for step, version in acknowledged:
        if there.get(step, -1) < version and (step not in retired or not any(other > step for other in there)):
            return f"step {step} was acknowledged (version {version}) and is gone or older"
    older = set(acknowledged) - {newest}
    if newest is not None and (found.restored is None or (found.restored, there.get(found.restored)) in older):
        return f"step {newest[0]} was acknowledged and a restore gives {found.restored}"
    if found.restored is None and there:
        return f"steps {sorted(there)} are good and a restore finds nothing"
    return None
