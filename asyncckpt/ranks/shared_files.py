"""Rank 0 puts the ranks' parts of each file together, and links the files that none of them has changed.

A rank whose part of a frozen file has not changed writes nothing of it and says so in its report. Only where all that
have a part say so, and their digests together are those that the manifest of the checkpoint before lists, is the file
linked. The others are written: their ranks copy their parts out of the checkpoint before, so that none has to keep them
in memory while it waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asyncckpt.commit.transaction import SaveTransaction
from asyncckpt.errors import SaveFailed
from asyncckpt.manifest.parse import extent_of
from asyncckpt.manifest.records import FileRecord


@dataclass(frozen=True, slots=True)
class HeldBack:
    """Lists the ``files`` that cannot be linked and of which some rank has not written its part, those ``ranks``, and
    the room that is still needed: a file that some rank has begun has its blocks already."""

    files: dict[str, None]
    ranks: frozenset[int]
    nbytes: int


def link_unchanged(
    save: SaveTransaction, reports: Sequence[Mapping[str, Any]], files: Sequence[FileRecord]
) -> HeldBack:
    """Link the files that no rank has changed. Returns the others that are not whole yet. Blocks on the disk."""
    writers = Counter(row["name"] for report in reports for row in report["files"])
    holders: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        for name in report["held_back"]:
            holders.setdefault(name, []).append(rank)
    own = save.shards.compared_with
    ask: dict[str, None] = {}
    nbytes = 0
    for record in files if holders else ():
        ranks = holders.get(record.name, ())
        if not ranks:
            continue
        if len(ranks) == writers[record.name]:
            alike = all(reports[rank]["compared_with"] == own for rank in ranks)
            if alike and save.shards.link_shared(record):
                continue
            nbytes += record.nbytes
        ask[record.name] = None
    return HeldBack(ask, frozenset(rank for name in ask for rank in holders[name]), nbytes)


def merge_files(reports: Sequence[Mapping[str, Any]], step: int) -> list[FileRecord]:
    """Merge the records of each file. Raises ``SaveFailed`` where the ranks do not have every byte exactly once."""
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
