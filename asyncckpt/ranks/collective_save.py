"""One checkpoint written by all ranks of a job: each writes its part and reports, rank 0 publishes, all learn of it.

A rank's report holds the digests of what it wrote; only rank 0 makes small files and the manifest, and only it may
delete the attempt's directory before the outcome is known. A rank that fails says so at once; one that says nothing is
waited for with a deadline. Nothing is published unless every rank reported success for this very attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from asyncckpt import jsontree
from asyncckpt.codecs.digests import DEFAULT
from asyncckpt.codecs.digests import get as get_digest
from asyncckpt.commit.transaction import SaveTransaction
from asyncckpt.errors import AsyncCkptError, PlanChanged, RanksDisagree, SaveFailed
from asyncckpt.manifest import json as manifest
from asyncckpt.manifest.draft import Contents
from asyncckpt.manifest.parse import extent_of
from asyncckpt.manifest.records import FileRecord, Manifest
from asyncckpt.protocols import PendingDirectory
from asyncckpt.ranks.merging import merge_trees
from asyncckpt.ranks.replicas import ReplicaSample, named
from asyncckpt.ranks.store import RankStore, error_from_json, error_to_json
from asyncckpt.types import JsonValue, Layout

#: The other ranks wait so much longer than rank 0's own deadline before they take it for lost.
_GRACE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class RankSave:
    """One save, as this rank takes part in it. ``number`` counts the calls of ``save``, alike on every rank.
    ``rank_local_names``: component → the name that this rank's own is stored under; ``sends_values_of``,
    ``values_like`` and ``owners``: see ``AgreedPlan``. ``sample``: of the tensors that must be equal on several ranks;
    ``replicas``: their digests, where all of each is compared.
    ``planned``: all ranks have planned this save together, so one that asked for a plan does not end it."""

    ranks: RankStore
    number: int
    rank_local_names: Mapping[str, str]
    sends_values_of: frozenset[str]
    values_like: Mapping[str, int] = field(default_factory=dict)
    owners: Mapping[str, int] = field(default_factory=dict)
    sample: ReplicaSample | None = None
    replicas: Mapping[str, str] = field(default_factory=dict)
    planned: bool = False

    @property
    def reports(self) -> str:
        return f"save/{self.number}"

    @property
    def outcome(self) -> str:
        return f"save/{self.number}/outcome"

    def replan(self, rank: int) -> str:
        """Return the key under which a rank says that it cannot save without a new plan."""
        return f"save/{self.number}/replan/{rank}"


class Follower:
    """Takes the part of a rank other than 0: reports what it has written, and learns whether that was published."""

    def __init__(self, rank_save: RankSave) -> None:
        self._rank_save = rank_save
        self._reported = self._given_up = False

    @property
    def keeps_files(self) -> bool:
        # unless rank 0 gave up too, it may be about to publish, and these are its files
        return not self._given_up

    def least_bytes(self, layout: Layout) -> int:
        return 0

    def written_bytes(self, save: SaveTransaction, written: Manifest) -> int:
        return save.shards.written_bytes

    def prepare(self, save: SaveTransaction, directory: PendingDirectory) -> dict[str, bytes]:
        names = set(self._rank_save.rank_local_names.values())
        kinds = {name: kind for name, kind in save.contents.kinds.items() if name in names}
        return save.write_small(directory, replace(save.contents, kinds=kinds), state=False)

    def publish(
        self,
        save: SaveTransaction,
        directory: PendingDirectory,
        small: Mapping[str, bytes],
        check_lease: Callable[[], None],
        read_back: Callable[[PendingDirectory], None] | None,
    ) -> Manifest:
        directory.sync_directory()
        save.scope.begin_publish()  # from the report on, rank 0 may publish
        rank_save = self._rank_save
        beside = [manifest.whole_file(name, data, save.digest) for name, data in small.items()]
        files = [*save.shards.records(), *beside]
        rank_save.ranks.post(f"{rank_save.reports}/{rank_save.ranks.rank}", _report(save, rank_save, files))
        self._reported = True
        timeout = 2 * rank_save.ranks.options.timeout_seconds + _GRACE_SECONDS
        outcome = rank_save.ranks.read(rank_save.outcome, timeout, f"step {save.step}: rank 0")
        if outcome["error"] is not None:
            self._given_up = True
            raise error_from_json(outcome["error"])
        return replace(save.contents.draft, name=outcome["name"], size_bytes=outcome["nbytes"])

    def failed(self, save: SaveTransaction, error: BaseException) -> BaseException:
        if self._reported:
            return error
        self._reported = True
        _try_post(
            self._rank_save, f"{self._rank_save.reports}/{self._rank_save.ranks.rank}", {"error": error_to_json(error)}
        )
        reason = self._reason() if isinstance(save.scope.error, FileNotFoundError) else None
        return error if reason is None else reason

    def _reason(self) -> AsyncCkptError | None:
        """Return why rank 0 gave this save up, if it has: the attempt's directory is gone then."""
        ranks, key = self._rank_save.ranks, self._rank_save.outcome
        try:
            outcome = ranks.read(key, 10.0, "rank 0") if ranks.exists(key) else {}
        except (RuntimeError, AsyncCkptError):
            return None
        return error_from_json(outcome["error"]) if outcome.get("error") else None


class Leader:
    """Takes the part of rank 0: waits for the others' reports, publishes all of it, and tells them."""

    keeps_files = False

    def __init__(self, rank_save: RankSave) -> None:
        self._rank_save = rank_save
        self._told = False

    def least_bytes(self, layout: Layout) -> int:
        return layout.nbytes

    def written_bytes(self, save: SaveTransaction, written: Manifest) -> int:
        return save.shards.written_bytes

    def prepare(self, save: SaveTransaction, directory: PendingDirectory) -> dict[str, bytes]:
        return {}

    def publish(
        self,
        save: SaveTransaction,
        directory: PendingDirectory,
        small: Mapping[str, bytes],
        check_lease: Callable[[], None],
        read_back: Callable[[PendingDirectory], None] | None,
    ) -> Manifest:
        rank_save, draft = self._rank_save, save.contents.draft
        bodies = rank_save.ranks.gather(
            rank_save.reports,
            rank_save.ranks.options.timeout_seconds,
            f"report its part of step {save.step}",
            lambda _rank, body: body["error"] is not None or _mismatch(body, draft) is not None,
            lambda rank: not rank_save.planned and rank_save.ranks.exists(rank_save.replan(rank)),
        )
        reports = [_report(save, rank_save, save.shards.records()), *bodies[1:]]
        self._check(reports, draft)
        contents = _merge_reports(save.contents, rank_save, reports)
        small = save.write_small(directory, contents)
        orders = {file: order for report in reports for file, order in report["orders"].items()}
        files = _files(reports, save.step)
        written = save.publish(directory, contents, files, orders, small, check_lease, read_back)
        self._told = True
        _try_post(rank_save, rank_save.outcome, {"error": None, "name": written.name, "nbytes": written.nbytes})
        if rank_save.number > 1:  # a rank that has reported for this save has read the outcome of that one
            rank_save.ranks.forget(replace(rank_save, number=rank_save.number - 2).outcome)
        return written

    def failed(self, save: SaveTransaction, error: BaseException) -> BaseException:
        if not self._told:
            self._told = True
            _try_post(self._rank_save, self._rank_save.outcome, {"error": error_to_json(error)})
        return error

    def _check(self, reports: Sequence[Any], draft: Manifest) -> None:
        for rank, body in enumerate(reports):
            if isinstance(body, dict) and body.get("error") is not None:
                raise error_from_json(body["error"], f"rank {rank}")
        odd = {rank: found for rank, body in enumerate(reports) if body and (found := _mismatch(body, draft))}
        if odd:
            shown = "; ".join(f"rank {rank} saves {what}" for rank, what in sorted(odd.items())[:8])
            raise RanksDisagree(
                f"step {draft.step} ({draft.kind}): {shown}. Every rank has to save the same steps of one "
                f"state; nothing was published"
            )
        self._check_values(reports, draft.step)
        self._check_replicas(reports, draft.step)
        changed = [rank for rank, body in enumerate(reports) if body is None]
        if changed:
            raise PlanChanged(
                f"step {draft.step}: names or shapes changed on ranks {changed} alone, so this save was given up; the "
                f"next one is planned anew"
            )

    def _check_replicas(self, reports: Sequence[Any], step: int) -> None:
        sample = self._rank_save.sample
        first: dict[tuple[str, bool], tuple[int, str]] = {}
        differing: dict[tuple[str, int], list[int]] = {}
        for rank, body in enumerate(reports):
            if not body:
                continue
            found = {(name, True): digest for name, digest in body["replicas"].items()}
            if sample is not None:
                sampled = named(sample.replicated, rank, body["sample"])
                found |= {(name, False): digest for name, digest in sampled.items()}
            for key, digest in found.items():
                holder, known = first.setdefault(key, (rank, digest))
                if known != digest and rank not in (ranks := differing.setdefault((key[0], holder), [])):
                    ranks.append(rank)
        if differing:
            shown = "; ".join(
                f"{name} on ranks {ranks} from rank {holder}'s" for (name, holder), ranks in list(differing.items())[:8]
            )
            more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
            name, holder = next(iter(differing))
            raise RanksDisagree(
                f"step {step}: tensors that every rank should have a copy of differ: {shown}{more}. Nothing was "
                f"published; broadcast them, save them under other names, or say whose are right: "
                f"{name.partition('.')[0]!r}: asyncckpt.Owner(…, rank={holder})"
            )

    def _check_values(self, reports: Sequence[Any], step: int) -> None:
        """Compare the plain values of components that several ranks hold alike, of which one alone sends them."""
        for rank, body in enumerate(reports):
            for name, (like, digests) in (body["values"] if body else {}).items():
                other = reports[like]["values"][name][1] if reports[like] else digests
                keys = [key for key in {**other, **digests} if other.get(key) != digests.get(key)]
                if keys:
                    raise RanksDisagree(
                        f"step {step}: {', '.join(f'{name}.{key}' if key else name for key in keys)} of rank {rank} "
                        f"differs from rank {like}'s, which holds the same tensors. Nothing was published; make it "
                        f"equal, or say whose is right: {name!r}: asyncckpt.Owner(…, rank={like})"
                    )


def _mismatch(body: Mapping[str, Any], draft: Manifest) -> str | None:
    """Say in words what another rank's report saves, or return None where it saves the same as this rank."""
    if (body["step"], body["kind"]) != (draft.step, draft.kind):
        return f"step {body['step']} ({body['kind']})"
    if body["layout"] != draft.layout:
        return "another state (its names or shapes)"
    if tuple(body["names"]) != draft.names:
        return f"it under the names {list(body['names'])}"
    return f"into another attempt ({body['attempt']})" if body["attempt"] != draft.attempt else None


def _report(save: SaveTransaction, rank_save: RankSave, files: Sequence[FileRecord]) -> dict[str, Any]:
    """Make the report that tells rank 0 what this rank has written. ``files``: those that it wrote, or a part of."""
    contents = save.contents
    own = set(rank_save.rank_local_names.values())
    shards = tuple(shard for shard in contents.layout.shards if shard.component in own)
    orders = save.shards.orders()
    kinds = {name: contents.kinds[name] for name in own}
    entries = manifest.components_of(
        replace(contents.layout, shards=shards), kinds, contents.aliases, contents.descriptions, orders
    )
    written = {record.name for record in files}
    groups, sample = rank_save.sample.digests() if rank_save.sample is not None else ({}, {})
    sent = own | rank_save.sends_values_of
    return {
        "error": None,
        "step": contents.draft.step,
        "kind": contents.draft.kind,
        "layout": contents.draft.layout,
        "attempt": contents.draft.attempt,
        "names": list(contents.draft.names),
        "files": [manifest.file_to_json(record) for record in files],
        "orders": {file: order for file, order in orders.items() if file in written and order},
        "own": entries,
        "trees": {name: tree for name, tree in contents.trees.items() if name in sent},
        "aliases": {name: dict(found) for name, found in contents.aliases.items() if name in rank_save.sends_values_of},
        "descriptions": {name: contents.descriptions.get(name, {}) for name in rank_save.sends_values_of},
        "replicas": dict(rank_save.replicas),
        "sample": sample,
        "groups": groups,
        "values": {name: [like, _values(contents.trees[name])] for name, like in rank_save.values_like.items()},
    }


def _values(tree: JsonValue) -> dict[str, str]:
    """Digest a component's plain values, by its keys where it is a dict."""
    digest = get_digest(DEFAULT)
    parts = tree if isinstance(tree, dict) and "$" not in tree else {"": tree}
    return {key: digest(jsontree.dumps(value))[:16] for key, value in parts.items()}


def _merge_reports(contents: Contents, rank_save: RankSave, reports: Sequence[Mapping[str, Any]]) -> Contents:
    """Merge all reports into the checkpoint's contents: a shared component's values come from the ranks that lead it,
    and a rank's own component is kept where it differs from rank 0's."""
    own_of_lead = set(rank_save.rank_local_names.values())
    trees: dict[str, JsonValue] = {}
    shared: dict[str, list[tuple[int, JsonValue]]] = {}
    aliases: dict[str, dict[str, str]] = {name: {} for name in contents.kinds}
    descriptions: dict[str, dict[str, Any]] = {name: {} for name in contents.kinds}
    others: dict[str, JsonValue] = {}
    groups = {name: digest for report in reports for name, digest in report["groups"].items()}
    for rank, report in enumerate(reports):
        for name, tree in report["trees"].items():
            if name not in report["own"]:
                shared.setdefault(name, []).append((rank, tree))
            elif rank == 0:
                trees[name] = tree
            else:
                entry = report["own"][name]
                base = name.removesuffix(f"+{rank}")
                if entry["tensors"] or base not in own_of_lead or tree != trees.get(base):
                    trees[name], others[name] = tree, entry
        for name, found in report["aliases"].items():
            _add_aliases(name, aliases[name], found, rank)
        for name, found in report["descriptions"].items():
            strides = {**found.get("strides", {}), **descriptions[name].get("strides", {})}
            descriptions[name] = {**found, **descriptions[name]} | ({"strides": strides} if strides else {})
    for name, found in shared.items():
        kind, owner = contents.kinds[name], rank_save.owners.get(name)
        found.sort(key=lambda item: item[0] != owner)  # the owner's come first
        digests = {key.removeprefix(f"{name}."): digest for key, digest in groups.items() if key.startswith(f"{name}.")}
        trees[name] = merge_trees(name, kind, found, digests, first_is_right=owner is not None or kind == "module")
    described = {**contents.descriptions, **{name: found for name, found in descriptions.items() if found}}
    return replace(contents, trees=trees, aliases=aliases, descriptions=described, others=others)


def _add_aliases(component: str, known: dict[str, str], found: Mapping[str, str], rank: int) -> None:
    """Add a rank's other names of tied tensors to those of the ranks before it."""
    for alias, target in found.items():
        if known.setdefault(alias, target) != target:
            raise RanksDisagree(
                f"tensor {component}.{alias} is tied to {target!r} on rank {rank}, and to {known[alias]!r} on a rank "
                f"before it. Tie it alike on all ranks that have it"
            )


def _files(reports: Sequence[Mapping[str, Any]], step: int) -> list[FileRecord]:
    """Merge the records of each file. Raises ``SaveFailed`` where the ranks did not write every byte exactly once."""
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        for row in report["files"]:
            known = found.setdefault(row["name"], row)
            if known is not row:
                known["extents"] += row["extents"]
    records: list[FileRecord] = []
    for name, row in found.items():
        extents = tuple(extent_of(extent) for extent in sorted(row["extents"]))
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


def _try_post(rank_save: RankSave, key: str, body: Any) -> None:
    """Post a message if the store still answers. Where it is gone, so is the job, and the others' deadlines end it."""
    try:
        rank_save.ranks.post(key, body)
    except (RuntimeError, AsyncCkptError):
        return
