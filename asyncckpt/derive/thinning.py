"""``thin`` leaves the weights alone of old checkpoints of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.catalog.retention import Candidate, plan
from asyncckpt.commit.publication import take_over
from asyncckpt.commit.thinner import THIN, Thinned
from asyncckpt.commit.thinner import thin as thin_one
from asyncckpt.errors import CheckpointDamaged, CheckpointNotFound, InvalidOption, UnsupportedValue, storage_errors
from asyncckpt.read.verify import Progress
from asyncckpt.run import Run


@dataclass(frozen=True, slots=True)
class ThinningReport:
    """Tells what ``thin`` did, or would do: ``thinned``, and ``kept``: why others stay whole, by name."""

    thinned: tuple[Thinned, ...]
    kept: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Other:
    """Keeps all steps but some: ``steps``, or, without them, those before ``before``."""

    steps: frozenset[int]
    before: int | None

    def keep(self, candidates: Sequence[Candidate]) -> set[int]:
        return {one.step for one in candidates if not self.chooses(one.step)}

    def chooses(self, step: int) -> bool:
        return step in self.steps if self.steps else self.before is None or step < self.before

    def describe(self) -> str:
        return "all but what is thinned out"


def thin(
    run: str | os.PathLike[str],
    steps: Sequence[int] = (),
    *,
    older_than: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ThinningReport:
    """Leave the weights alone of full checkpoints: each becomes a weights-only one, which links the modules' files.

    ``steps``: which; or ``older_than``: all of steps before this one; without both, all but the newest. What stays: the
    modules, metrics, config, assets, names, and the place in training's line; optimizers, schedulers, RNGs and all else
    go. The newest full checkpoint, pinned and damaged ones, and those that a name means which moves, stay whole, as do
    those that somebody reads, that have no module, or whose files hold tensors of a module beside others. First the
    newest is verified: where it is damaged, nothing is done. ``dry_run`` only says what would be done.

    Each weights-only checkpoint is durable before the full one goes. Where this ends in between, both are there, and
    the next call goes on. No other process may be writing the run. Blocks; ``progress(done_bytes, total_bytes)``: of
    the verification. Raises ``InvalidOption``, ``CheckpointNotFound``, ``CheckpointDamaged``, ``RunLocked``,
    ``LeaseLost`` and ``StorageFailed``."""
    policy = _Other(frozenset(_checked(steps)), older_than)
    if older_than is not None and (steps or type(older_than) is not int or older_than < 0):
        raise InvalidOption(f"give steps, or older_than, a whole number >= 0; not {older_than!r} and {list(steps)!r}")
    reading = Run(run)
    own = _own(reading)
    missing = sorted(policy.steps - {entry.step for entry in own})
    if missing:
        raise CheckpointNotFound(f"{reading.path}: no usable full checkpoint of step {missing[0]}")
    chosen = [entry for entry in plan(own, [policy]) if entry.kind == "full"]
    kept = {entry.name: _why(entry, own) for entry in own if policy.chooses(entry.step) and entry not in chosen}
    full = [entry for entry in own if entry.kind == "full"]
    if not chosen or dry_run:
        would = tuple(Thinned(one.step, one.name, f"weights-{one.name}", 0, 0) for one in chosen)
        return ThinningReport(would, {name: why for name, why in kept.items() if why})
    damage = reading.verify_entry(full[-1], progress=progress)
    if damage:
        raise CheckpointDamaged(
            f"{full[-1].path}, the newest, is damaged ({damage[0]}); nothing was thinned out. Look at the run with "
            f"`asyncckpt verify --all {reading.path}`"
        )
    done: list[Thinned] = []
    store = reading._store
    with storage_errors(reading.path):
        held = take_over(store)
        try:
            still = {entry.name: entry for entry in plan(_own(reading), [policy]) if entry.kind == "full"}
            twins = {entry.attempt: entry for entry in reading.ls() if entry.derived == THIN and entry.damage is None}
            for entry in (one for one in chosen if one.name in still):
                twin = twins.get(entry.attempt)
                try:
                    if twin is None:
                        with reading.open_entry(entry) as checkpoint:
                            made = thin_one(store, checkpoint, store.names(), held.check)
                    else:
                        made = Thinned(entry.step, entry.name, twin.name, twin.nbytes, entry.nbytes - twin.nbytes)
                except UnsupportedValue as error:
                    kept[entry.name] = str(error)
                    continue
                held.check()
                if store.remove(entry.name):
                    done.append(made)
                else:
                    kept[entry.name] = f"it is being read; its weights are {made.name} already"
        finally:
            held.release()
    return ThinningReport(tuple(done), {name: why for name, why in kept.items() if why})


def _checked(steps: Sequence[int]) -> Sequence[int]:
    if not all(type(step) is int and step >= 0 for step in steps):
        raise InvalidOption(f"steps must be whole numbers >= 0, not {steps!r:.80}")
    return steps


def _own(run: Run) -> list[CheckpointInfo]:
    return [entry for entry in run.ls() if entry.damage is None and not entry.renamed]


def _why(entry: CheckpointInfo, own: Sequence[CheckpointInfo]) -> str:
    """Say why retention must leave a checkpoint alone; empty where there is nothing to say."""
    if entry.kind != "full":
        return ""
    if entry.pinned:
        return "it is pinned"
    newest = [one for one in own if one.kind == "full"][-1]
    return "it is the newest" if entry is newest else f"it has a name that moves ({', '.join(entry.names)})"
