"""One checkpoint written by all ranks of a job: each writes its part and reports, rank 0 publishes, all learn of it.

A rank's report holds the digests of what it wrote; only rank 0 makes small files and the manifest, and only it may
delete the attempt's directory before the outcome is known. A rank that fails says so at once; one that says nothing is
waited for with a deadline. Nothing is published unless every rank reported success for this very attempt.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from asyncckpt import jsontree
from asyncckpt.codecs.digests import DEFAULT
from asyncckpt.codecs.digests import get as get_digest
from asyncckpt.commit.transaction import SaveTransaction
from asyncckpt.errors import AsyncCkptError
from asyncckpt.manifest import json as manifest
from asyncckpt.manifest.component_rows import components_of
from asyncckpt.manifest.records import FileRecord, Manifest
from asyncckpt.memory.gc_pause import gc_paused
from asyncckpt.plan.partition import SpreadTensors
from asyncckpt.protocols import PendingDirectory
from asyncckpt.ranks.part_reports import boxes_of, merge_boxes, merge_parts, own_rows, write_part
from asyncckpt.ranks.replicas import ReplicaSample, united
from asyncckpt.ranks.report_checks import check_reports, mismatch
from asyncckpt.ranks.reports import merge_reports, slowest_ranks
from asyncckpt.ranks.shared_files import HeldBack, link_unchanged, merge_files
from asyncckpt.ranks.store import RankStore, error_from_json, error_to_json
from asyncckpt.types import JsonValue

#: The other ranks wait so much longer than rank 0's own deadline before they take it for lost.
_GRACE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class RankSave:
    """One save, as this rank takes part in it. ``number`` counts the calls of ``save``, alike on every rank.
    ``rank_local_names``: component → the name that this rank's own is stored under; ``sends_values_of``,
    ``values_like`` and ``owners``: see ``AgreedPlan``. ``sample``: of the tensors that must be equal on several ranks;
    ``replicas``: their digests, where all of each is compared.
    ``planned``: all ranks have planned this save together, so one that asked for a plan does not end it.
    ``asked_again``: the numbers of the saves with a second round, which rank 0 keeps. ``spread``: who writes what,
    where each rank writes files of its own."""

    ranks: RankStore
    number: int
    rank_local_names: Mapping[str, str]
    sends_values_of: frozenset[str]
    values_like: Mapping[str, int] = field(default_factory=dict)
    owners: Mapping[str, int] = field(default_factory=dict)
    sample: ReplicaSample | None = None
    replicas: Mapping[str, str] = field(default_factory=dict)
    planned: bool = False
    asked_again: set[int] = field(default_factory=set)
    spread: SpreadTensors | None = None

    @property
    def reports(self) -> str:
        return f"save/{self.number}"

    @property
    def outcome(self) -> str:
        return f"save/{self.number}/outcome"

    @property
    def second_reports(self) -> str:
        return f"save/{self.number}/second"

    @property
    def second_outcome(self) -> str:
        return f"save/{self.number}/second/outcome"

    @property
    def in_parts(self) -> bool:
        """Whether each rank writes its part of the manifest itself."""
        return self.spread is not None and self.spread.rows > self.ranks.options.manifest_rows

    def replan(self, rank: int) -> str:
        """Return the key under which a rank says that it cannot save without a new plan."""
        return f"save/{self.number}/replan/{rank}"


class Follower:
    """Takes the part of a rank other than 0: reports what it has written, and learns whether that was published."""

    def __init__(self, rank_save: RankSave) -> None:
        self._rank_save = rank_save
        self._reported = self._given_up = False
        self._report = f"{rank_save.reports}/{rank_save.ranks.rank}"
        self._outcome = rank_save.outcome

    @property
    def keeps_files(self) -> bool:
        # unless rank 0 gave up too, it may be about to publish, and these are its files
        return not self._given_up

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
        rank_save = self._rank_save
        beside = [manifest.whole_file(name, data, save.digest) for name, data in small.items()]
        files = [*save.shards.written.records(), *beside]
        report = _report(save, rank_save, directory, files)
        directory.sync_directory()
        save.scope.begin_publish()  # from the report on, rank 0 may publish
        rank_save.ranks.post(self._report, report)
        self._reported = True
        outcome = self._read_outcome(save)
        if "write" in outcome:
            self._outcome = rank_save.second_outcome
            self._write_held_back(save, directory, outcome)
            outcome = self._read_outcome(save)
            rank_save.ranks.forget(f"{rank_save.second_reports}/{rank_save.ranks.rank}")
        rank_save.ranks.forget(f"{rank_save.reports}/{rank_save.ranks.rank}")
        if outcome["error"] is not None:
            self._given_up = True
            raise error_from_json(outcome["error"])
        return replace(save.contents.draft, name=outcome["name"], size_bytes=outcome["nbytes"])

    def _read_outcome(self, save: SaveTransaction) -> Any:
        ranks = self._rank_save.ranks
        timeout = 2 * ranks.options.timeout_seconds + _GRACE_SECONDS
        return ranks.read(self._outcome, timeout, f"step {save.step}: rank 0")

    def _write_held_back(self, save: SaveTransaction, directory: PendingDirectory, asked: Mapping[str, Any]) -> None:
        """Write what this rank has held back of the files that rank 0 asks for, and report again where it has."""
        if asked["write"].keys().isdisjoint(save.shards.held_back()):
            return
        save.scope.put_off_publish()  # until the second report, rank 0 publishes nothing
        self._reported, self._report = False, f"{self._rank_save.second_reports}/{self._rank_save.ranks.rank}"
        save.shards.write_held_back(asked["write"], links=asked["links"])
        save.wait_written()
        directory.sync_directory()
        save.scope.begin_publish()
        self._rank_save.ranks.post(self._report, {"error": None})
        self._reported = True

    def failed(self, save: SaveTransaction, error: BaseException) -> BaseException:
        if self._reported:
            return error
        self._reported = True
        _try_post(self._rank_save, self._report, {"error": error_to_json(error)})
        reason = self._reason() if isinstance(save.scope.error, FileNotFoundError) else None
        return error if reason is None else reason

    def _reason(self) -> AsyncCkptError | None:
        """Return why rank 0 gave this save up, if it has: the attempt's directory is gone then."""
        ranks, key = self._rank_save.ranks, self._outcome
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
        self._outcome = rank_save.outcome

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
        mine = _report(save, rank_save, directory, save.shards.written.records())
        arrivals: dict[int, float] = {}
        messages = rank_save.ranks.gather(
            rank_save.reports,
            rank_save.ranks.options.timeout_seconds,
            f"report its part of step {save.step}",
            lambda _rank, body: body["error"] is not None or mismatch(body, draft) is not None,
            lambda rank: not rank_save.planned and rank_save.ranks.exists(rank_save.replan(rank)),
            arrivals=arrivals,
        )
        # thousands of reports that live for a moment are no reason to collect garbage
        with gc_paused() if rank_save.in_parts else contextlib.nullcontext():
            reports = [mine, *(message.read() for message in messages[1:])]
            check_reports(reports, draft, rank_save.sample)
            for name in {report["damaged"] for report in reports} - {""}:
                save.shards.hear_of_damage(name)
            save.emit(slowest_ranks(save.step, reports, arrivals))
            files = merge_files(reports, save.step)
            held_back = link_unchanged(save, reports, files)
            if held_back.files:
                self._have_written(save, held_back)
            contents = merge_reports(save.contents, reports, rank_save.rank_local_names, rank_save.owners)
            parts = None
            if rank_save.spread is not None and rank_save.in_parts:
                own_of_lead = frozenset(rank_save.rank_local_names.values())
                contents, parts = merge_parts(contents, reports, rank_save.spread, own_of_lead)
            elif rank_save.spread is not None:
                contents = merge_boxes(contents, reports, rank_save.spread)
            orders = {file: order for report in reports for file, order in report["orders"].items()}
            del reports
        small = save.write_small(directory, contents)
        written = save.publish(directory, contents, files, orders, small, check_lease, read_back, parts)
        self._told = True
        _try_post(rank_save, self._outcome, {"error": None, "name": written.name, "nbytes": written.nbytes})
        if rank_save.number > 1:  # a rank that has reported for this save has read the outcome of that one
            old = replace(rank_save, number=rank_save.number - 2)
            again = [old.second_outcome] if old.number in rank_save.asked_again else []
            rank_save.asked_again.discard(old.number)
            rank_save.ranks.forget(old.outcome, *again)
        return written

    def _have_written(self, save: SaveTransaction, held_back: HeldBack) -> None:
        """Ask the ranks that have held back parts of files which cannot be linked to write them, and wait until all
        have. Their first reports hold: what they write is what the checkpoint before has."""
        rank_save = self._rank_save
        save.make_room(held_back.nbytes)
        links = save.shards.links_shared
        rank_save.ranks.post(self._outcome, {"error": None, "write": held_back.files, "links": links})
        self._outcome = rank_save.second_outcome
        rank_save.asked_again.add(rank_save.number)
        save.shards.write_held_back(held_back.files, links=links)
        save.wait_written()
        messages = rank_save.ranks.gather(
            rank_save.second_reports,
            rank_save.ranks.options.timeout_seconds,
            f"write its part of step {save.step}, which other ranks have changed",
            lambda _rank, body: body["error"] is not None,
            ranks=held_back.ranks - {rank_save.ranks.rank},
        )
        for rank, body in enumerate(message.read() for message in messages):
            if body is not None and body["error"] is not None:
                raise error_from_json(body["error"], f"rank {rank}")

    def failed(self, save: SaveTransaction, error: BaseException) -> BaseException:
        if not self._told:
            self._told = True
            _try_post(self._rank_save, self._outcome, {"error": error_to_json(error)})
        return error


def _report(
    save: SaveTransaction, rank_save: RankSave, directory: PendingDirectory, files: Sequence[FileRecord]
) -> dict[str, Any]:
    """Make the report that tells rank 0 what this rank has written. ``files``: those that it wrote, or a part of. Where
    the rank writes its part of the manifest itself, this does so, and the report has a row about it alone."""
    contents = save.contents
    own = set(rank_save.rank_local_names.values())
    shards = tuple(shard for shard in contents.layout.shards if shard.component in own)
    orders = save.shards.written.orders()
    kinds = {name: contents.kinds[name] for name in own}
    entries = components_of(
        replace(contents.layout, shards=shards), kinds, contents.aliases, contents.descriptions, orders
    )
    written = {record.name for record in files}
    groups, sample = rank_save.sample.digests() if rank_save.sample is not None else ({}, {})
    sent: frozenset[str] = rank_save.sends_values_of | own
    spread, described = rank_save.spread, {}
    if spread is not None and rank_save.in_parts:
        described = {
            "part": write_part(save, directory, rank_save.ranks.rank, spread, files, entries),
            "own_rows": own_rows(contents, entries),
        }
        files, entries, sent = (), {}, rank_save.sends_values_of
    elif spread is not None:
        described = {"boxes": boxes_of(contents.layout, spread)}
    if spread is not None:
        orders = {}  # nothing is packed on write
    return {
        **described,
        "error": None,
        "step": contents.draft.step,
        "kind": contents.draft.kind,
        "layout": contents.draft.layout,
        "attempt": contents.draft.attempt,
        "phases": [save.scope.staged_seconds, save.written_seconds - save.started_seconds],
        "names": list(contents.draft.names),
        "files": [manifest.file_to_json(record) for record in files],
        "damaged": save.shards.damaged,
        "held_back": save.shards.held_back(),
        "compared_with": save.shards.compared_with,
        "orders": {file: order for file, order in orders.items() if file in written and order},
        "own": entries,
        "trees": {name: tree for name, tree in contents.trees.items() if name in sent},
        "aliases": {name: dict(found) for name, found in contents.aliases.items() if name in rank_save.sends_values_of},
        "descriptions": {name: contents.descriptions.get(name, {}) for name in rank_save.sends_values_of},
        "replicas": dict(rank_save.replicas),
        # text, which is parsed only where the digests of all of it differ between ranks
        "sample": json.dumps(sample),
        "sampled": united(rank_save.sample.replicated, rank_save.ranks.rank, sample) if rank_save.sample else {},
        "groups": groups,
        "values": {name: [like, _values(contents.trees[name])] for name, like in rank_save.values_like.items()},
    }


def _values(tree: JsonValue) -> dict[str, str]:
    """Digest a component's plain values, by its keys where it is a dict."""
    digest = get_digest(DEFAULT)
    parts = tree if isinstance(tree, dict) and "$" not in tree else {"": tree}
    return {key: digest(jsontree.dumps(value))[:16] for key, value in parts.items()}


def _try_post(rank_save: RankSave, key: str, body: Any) -> None:
    """Post a message if the store still answers. Where it is gone, so is the job, and the others' deadlines end it."""
    try:
        rank_save.ranks.post(key, body)
    except (RuntimeError, AsyncCkptError):
        return
