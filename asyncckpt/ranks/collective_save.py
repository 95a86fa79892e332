"""One checkpoint written by all ranks of a job: each writes its part and reports, rank 0 publishes, all learn of it.

A rank's report holds the digests of what it wrote; only rank 0 makes small files and the manifest, and only it may
delete the attempt's directory before the outcome is known. A rank that fails says so at once; one that says nothing is
waited for with a deadline. Nothing is published unless every rank reported success for this very attempt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from asyncckpt.commit.transaction import Save
from asyncckpt.errors import AsyncCkptError, PlanChanged, RanksDisagree, SaveFailed
from asyncckpt.manifest import json as manifest
from asyncckpt.manifest.draft import Contents
from asyncckpt.manifest.records import ExtentRecord, FileRecord, Manifest
from asyncckpt.protocols import Attempt
from asyncckpt.ranks.store import Ranks, retold, told
from asyncckpt.types import JsonValue

#: Beyond rank 0's own deadline, until the others take it for lost.
_GRACE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Party:
    """One save among the ranks. ``number`` counts the calls of ``save``, alike on every rank. ``own``: component → the
    name this rank's own is stored under; ``leads``: the shared ones whose plain values this rank sends. ``replicas``:
    digests of the tensors that are to be equal on every rank, where that is checked. ``planned``: all ranks planned
    this save together, so that one which asked for a plan is no reason to give up."""

    ranks: Ranks
    number: int
    own: Mapping[str, str]
    leads: frozenset[str]
    replicas: Mapping[str, str] = field(default_factory=dict)
    planned: bool = False

    @property
    def reports(self) -> str:
        return f"save/{self.number}"

    @property
    def outcome(self) -> str:
        return f"save/{self.number}/outcome"

    def replan(self, rank: int) -> str:
        """Where a rank says that it cannot save without a new plan."""
        return f"save/{self.number}/replan/{rank}"


class PartSave(Save):
    """The save of a rank other than 0."""

    def __init__(self, contents: Contents, party: Party, **options: Any) -> None:
        super().__init__(contents, **options)
        self._party = party
        self._reported = self._given_up = False

    def written_bytes(self, written: Manifest) -> int:
        return self.shards.written_bytes

    def commit(
        self, check_lease: Callable[[], None], timeout_seconds: float, read_back: Callable[[str], None] | None
    ) -> Manifest:
        try:
            return super().commit(check_lease, timeout_seconds, read_back)
        except BaseException as error:
            if not self._reported:
                _try_post(self._party, f"{self._party.reports}/{self._party.ranks.rank}", {"error": told(error)})
                if isinstance(error.__cause__, FileNotFoundError) and (reason := self._reason()) is not None:
                    raise reason from error
            raise

    def _reason(self) -> AsyncCkptError | None:
        """Why rank 0 gave this save up, where it has: the attempt's directory is gone then."""
        ranks, key = self._party.ranks, self._party.outcome
        try:
            outcome = ranks.read(key, 10.0, "rank 0") if ranks.there(key) else {}
        except (RuntimeError, AsyncCkptError):
            return None
        return retold(outcome["error"]) if outcome.get("error") else None

    def _meanwhile(self, attempt: Attempt) -> dict[str, bytes]:
        names = set(self._party.own.values())
        kinds = {name: kind for name, kind in self.contents.kinds.items() if name in names}
        return self._write_small(attempt, replace(self.contents, kinds=kinds), state=False)

    def _conclude(
        self,
        attempt: Attempt,
        small: Mapping[str, bytes],
        check_lease: Callable[[], None],
        read_back: Callable[[str], None] | None,
    ) -> Manifest:
        attempt.sync_directory()
        if self.error is not None:
            raise self.error
        party = self._party
        beside = [manifest.whole_file(name, data, self.digest) for name, data in small.items()]
        files = [*self.shards.records(), *beside]
        party.ranks.post(f"{party.reports}/{party.ranks.rank}", _report(self, party, files))
        self._reported = True
        timeout = 2 * party.ranks.options.timeout_seconds + _GRACE_SECONDS
        outcome = party.ranks.read(party.outcome, timeout, f"step {self.step}: rank 0")
        if outcome["error"] is not None:
            self._given_up = True
            raise retold(outcome["error"])
        return replace(self.contents.draft, name=outcome["name"], size_bytes=outcome["nbytes"])

    def discard(self, timeout_seconds: float, *, keep: bool = False) -> bool:
        # unless rank 0 gave up too, it may be about to publish, and these are its files
        return super().discard(timeout_seconds, keep=keep or not self._given_up)


class LeadSave(Save):
    """The save of rank 0."""

    def __init__(self, contents: Contents, party: Party, **options: Any) -> None:
        super().__init__(contents, **options)
        self._party = party
        self._told = False

    def written_bytes(self, written: Manifest) -> int:
        return self.shards.written_bytes

    def commit(
        self, check_lease: Callable[[], None], timeout_seconds: float, read_back: Callable[[str], None] | None
    ) -> Manifest:
        party = self._party
        try:
            written = super().commit(check_lease, timeout_seconds, read_back)
        except BaseException as error:
            self._tell(error)
            raise
        _try_post(party, party.outcome, {"error": None, "name": written.name, "nbytes": written.nbytes})
        if party.number > 1:  # everyone who reported for this one has read that one
            party.ranks.forget(replace(party, number=party.number - 2).outcome)
        return written

    def discard(self, timeout_seconds: float, *, keep: bool = False) -> bool:
        # the others are told why before their files are gone
        if self.error is not None:
            self._tell(self._typed(self.error))
        return super().discard(timeout_seconds, keep=keep)

    def _tell(self, error: BaseException) -> None:
        if not self._told:
            self._told = True
            _try_post(self._party, self._party.outcome, {"error": told(error)})

    def _needed_bytes(self) -> int:
        return max(super()._needed_bytes(), self.contents.layout.nbytes)

    def _meanwhile(self, attempt: Attempt) -> dict[str, bytes]:
        return {}

    def _conclude(
        self,
        attempt: Attempt,
        small: Mapping[str, bytes],
        check_lease: Callable[[], None],
        read_back: Callable[[str], None] | None,
    ) -> Manifest:
        party = self._party
        bodies = party.ranks.gather(
            party.reports,
            party.ranks.options.timeout_seconds,
            f"report its part of step {self.step}",
            lambda _rank, body: body["error"] is not None or self._odd(body) is not None,
            lambda rank: not party.planned and party.ranks.there(party.replan(rank)),
        )
        mine = _report(self, party, self.shards.records())
        self._check([mine, *bodies[1:]])
        reports = [mine, *bodies[1:]]
        contents = _merged(self.contents, party, reports)
        small = self._write_small(attempt, contents)
        orders = {file: order for report in reports for file, order in report["orders"].items()}
        return self._publish(attempt, contents, _files(reports, self.step), orders, small, check_lease, read_back)

    def _odd(self, body: Mapping[str, Any]) -> str | None:
        """What a rank saves, where it is not this."""
        draft = self.contents.draft
        if (body["step"], body["kind"]) != (draft.step, draft.kind):
            return f"step {body['step']} ({body['kind']})"
        if body["layout"] != draft.layout:
            return "another state (its names or shapes)"
        return f"into another attempt ({body['attempt']})" if body["attempt"] != draft.attempt else None

    def _check(self, reports: Sequence[Any]) -> None:
        for rank, body in enumerate(reports):
            if isinstance(body, dict) and body.get("error") is not None:
                raise retold(body["error"], f"rank {rank}")
        odd = {rank: found for rank, body in enumerate(reports) if body and (found := self._odd(body))}
        if odd:
            shown = "; ".join(f"rank {rank} saves {what}" for rank, what in sorted(odd.items())[:8])
            raise RanksDisagree(
                f"step {self.step} ({self.contents.draft.kind}): {shown}. Every rank has to save the same steps of one "
                f"state; nothing was published"
            )
        self._check_replicas(reports)
        changed = [rank for rank, body in enumerate(reports) if body is None]
        if changed:
            raise PlanChanged(
                f"step {self.step}: names or shapes changed on ranks {changed} alone, so this save was given up; the "
                f"next one is planned anew"
            )

    def _check_replicas(self, reports: Sequence[Any]) -> None:
        mine = self._party.replicas
        differing: dict[str, list[int]] = {}
        for rank, body in enumerate(reports):
            for name, digest in (body["replicas"] if body else {}).items():
                if mine.get(name, digest) != digest:
                    differing.setdefault(name, []).append(rank)
        if differing:
            shown = "; ".join(f"{name} on ranks {ranks}" for name, ranks in list(differing.items())[:8])
            more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
            raise RanksDisagree(
                f"step {self.step}: tensors that every rank should have a copy of differ from rank 0's: {shown}{more}. "
                f"Nothing was published; broadcast them, or save them under other names"
            )


def _report(save: Save, party: Party, files: Sequence[FileRecord]) -> dict[str, Any]:
    """What rank 0 has to know of a rank's part."""
    contents = save.contents
    own = set(party.own.values())
    shards = tuple(shard for shard in contents.layout.shards if shard.component in own)
    orders = save.shards.orders()
    kinds = {name: contents.kinds[name] for name in own}
    entries = manifest.components_of(replace(contents.layout, shards=shards), kinds, contents.aliases, orders)
    written = {record.name for record in files}
    sent = own | party.leads
    return {
        "error": None,
        "step": contents.draft.step,
        "kind": contents.draft.kind,
        "layout": contents.draft.layout,
        "attempt": contents.draft.attempt,
        "files": [manifest.file_to_json(record) for record in files],
        "orders": {file: order for file, order in orders.items() if file in written and order},
        "own": entries,
        "trees": {name: tree for name, tree in contents.trees.items() if name in sent},
        "aliases": {name: dict(found) for name, found in contents.aliases.items() if name in party.leads},
        "replicas": dict(party.replicas),
    }


def _merged(contents: Contents, party: Party, reports: Sequence[Mapping[str, Any]]) -> Contents:
    """The checkpoint's contents: shared components from whoever leads them, own ones of every rank that differ from
    rank 0's."""
    own_of_lead = set(party.own.values())
    trees: dict[str, JsonValue] = {}
    aliases: dict[str, dict[str, str]] = {name: {} for name in contents.kinds}
    others: dict[str, JsonValue] = {}
    for rank, report in enumerate(reports):
        for name, tree in report["trees"].items():
            if name not in report["own"]:
                trees[name] = _joined(trees[name], tree) if name in trees else tree
            elif rank == 0:
                trees[name] = tree
            else:
                entry = report["own"][name]
                base = name.removesuffix(f"+{rank}")
                if entry["tensors"] or base not in own_of_lead or tree != trees.get(base):
                    trees[name], others[name] = tree, entry
        for name, found in report["aliases"].items():
            aliases[name] |= found
    return replace(contents, trees=trees, aliases=aliases, others=others)


def _joined(first: JsonValue, second: JsonValue) -> JsonValue:
    """The plain values of a component whose parts different ranks hold (pipeline stages): dicts are united, lists of
    dicts (an optimizer's param groups) entry by entry, lists of names one after the other."""
    if isinstance(first, dict) and isinstance(second, dict):
        return {
            key: _joined(first[key], second[key]) if key in first and key in second else first.get(key, second.get(key))
            for key in {**first, **second}
        }
    if isinstance(first, list) and isinstance(second, list):
        if all(isinstance(item, dict) for item in (*first, *second)):
            return [
                _joined(a, b) if a is not None and b is not None else a if b is None else b
                for a, b in itertools.zip_longest(first, second)
            ]
        if all(isinstance(item, str) for item in (*first, *second)):
            return [*first, *(item for item in second if item not in set(first))]
    return first


def _files(reports: Sequence[Mapping[str, Any]], step: int) -> list[FileRecord]:
    """Every file with what all ranks wrote of it. Raises ``SaveFailed`` where that is not all of it, exactly once."""
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        for row in report["files"]:
            known = found.setdefault(row["name"], row)
            if known is not row:
                known["extents"] += row["extents"]
    records: list[FileRecord] = []
    for name, row in found.items():
        extents = tuple(ExtentRecord(*extent) for extent in sorted(row["extents"]))
        position = 0
        for extent in extents:
            if extent.offset != position:
                break
            position += extent.nbytes
        if position != row["nbytes"]:
            raise SaveFailed(f"step {step}: the ranks' parts of {name} do not make a whole; nothing was published")
        plan, bases, order = row.get("plan", ""), tuple(row.get("bases", ())), tuple(row.get("order", ()))
        records.append(FileRecord(name, row["nbytes"], extents, plan, bases, order))
    return records


def _try_post(party: Party, key: str, body: Any) -> None:
    """Where the store is gone, so is the job; the others' deadlines end it."""
    try:
        party.ranks.post(key, body)
    except (RuntimeError, AsyncCkptError):
        return
