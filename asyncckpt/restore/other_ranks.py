"""What each rank has of its own is restored by a job of another size: which state a new rank gets, if any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asyncckpt.manifest.records import Manifest
from asyncckpt.restore.plan import Options, RestorePlan, StoredTensors, decode, load, qualified_records
from asyncckpt.state.capture import kind_of
from asyncckpt.state.dtensor import is_distributed, is_sharded_tensor
from asyncckpt.state.markers import LocalShard, PerRank, Replicated
from asyncckpt.state.rank_names import rank_name
from asyncckpt.state.rng import RngState
from asyncckpt.types import JsonValue

#: Classes of these modules have a state that is a function of the step: it is the same on every rank.
_SAME_EVERYWHERE = ("torch.optim.", "torch.amp.", "torch.cuda.amp.")


@dataclass(slots=True)
class OtherRanks:
    """Plans the components that the checkpoint's ranks each had of their own, where the job has another size.
    ``derived`` and ``dropped``: see ``events.RanksChanged``."""

    manifest: Manifest
    trees: Mapping[str, JsonValue]
    rank: int
    size: int
    derived: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def plan(self, name: str, value: Any, opts: Options) -> RestorePlan | None:
        """Plan the restore of one live component. Returns None where it is restored like any other: where it is no
        component of each rank's own, or this rank has its state in the checkpoint, or all had the same."""
        record = self.manifest.components.get(name)
        saved = self.manifest.world_size
        if saved == self.size or record is None or record.kind not in ("stateful", "plain") or not opts.selected(name):
            return None
        if kind_of(value) != record.kind or isinstance(value, Replicated):
            return None
        own = [rank for rank in range(1, saved) if rank_name(name, rank) in self.manifest.components]
        if isinstance(value, PerRank):
            return self._by_rule(name, value, opts)
        if any(rank >= self.size for rank in own) and not isinstance(value, RngState):
            self.dropped.append(name)
        if self.rank < saved:
            return None
        if isinstance(value, RngState):
            return self._derive(name, value, opts)
        if self._is_everybodys(value, bool(own)):
            return None
        return RestorePlan(mismatched=[self._refusal(name, value)])

    def _is_everybodys(self, value: Any, differed: bool) -> bool:
        """Whether a rank of which nothing was saved may take over what rank 0 had."""
        if _has_parts(value):  # held together, by whichever ranks there are
            return True
        if differed:
            return False
        return kind_of(value) == "plain" or f"{type(value).__module__}.".startswith(_SAME_EVERYWHERE)

    def _refusal(self, name: str, value: Any) -> str:
        saved = self.manifest.world_size
        ranks = "1 rank" if saved == 1 else f"{saved} ranks"
        wrap = f"asyncckpt.PerRank({name}, rule) with a rule for it, " if kind_of(value) == "stateful" else ""
        return (
            f"{name}: saved by {ranks}, each with its own, and rank {self.rank} of {self.size} has none. Give every "
            f"rank asyncckpt.Replicated({name}) if it is the same everywhere, {wrap}or leave it out"
        )

    def _states(self, name: str, opts: Options) -> tuple[RestorePlan, list[Any]]:
        """Plan to read the states of all ranks that saved; return them, by rank."""
        plan, states = RestorePlan(), []
        for rank in range(self.manifest.world_size):
            source = rank_name(name, rank)
            if source not in self.manifest.components:  # it was the same as rank 0's
                source = name
            stored: StoredTensors = dict(qualified_records({name: self.manifest.components[source]}))
            part = RestorePlan()
            states.append(decode(name, self.trees.get(source), stored, part, opts))
            plan.merge(part)
        return plan, states

    def _by_rule(self, name: str, value: PerRank, opts: Options) -> RestorePlan:
        plan, states = self._states(name, opts)
        plan.finish.append(lambda: load(name, lambda: value.load_state_dict(value.rule(states, self.rank, self.size))))
        return plan

    def _derive(self, name: str, value: RngState, opts: Options) -> RestorePlan:
        plan, states = self._states(name, opts)
        plan.missing += value.lacking(states[0], name)
        if not plan.missing:
            plan.finish.append(lambda: load(name, lambda: value.load_derived(states, self.rank)))
        self.derived.append(name)
        return plan


def _has_parts(value: Any) -> bool:
    """Whether a ``LocalShard``, a DTensor or a ShardedTensor lies anywhere in nested containers, or in the state of an
    object."""
    if kind_of(value) == "stateful":
        return _has_parts(value.state_dict()) if not isinstance(value, RngState) else False
    if type(value) is dict:
        return any(map(_has_parts, value.values()))
    if type(value) in (list, tuple):
        return any(map(_has_parts, value))
    return isinstance(value, LocalShard) or is_distributed(value) or is_sharded_tensor(value)
