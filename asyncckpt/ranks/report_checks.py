"""Rank 0 compares what the ranks of a job report of one save: whether it is one state, and one state on all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from asyncckpt.errors import PlanChanged, RanksDisagree
from asyncckpt.manifest.records import Manifest
from asyncckpt.ranks.replicas import ReplicaSample, named
from asyncckpt.ranks.store import error_from_json


def check_reports(reports: Sequence[Any], draft: Manifest, sample: ReplicaSample | None) -> None:
    """Raise the error that a rank reports, ``RanksDisagree`` where ranks save different things, and ``PlanChanged``
    where some need a new plan. ``reports``: by rank, None for a rank that needs one. ``draft``: what rank 0 saves.
    ``sample``: what it has sampled of the tensors that must be equal on several ranks."""
    for rank, body in enumerate(reports):
        if isinstance(body, dict) and body.get("error") is not None:
            raise error_from_json(body["error"], f"rank {rank}")
    odd = {rank: found for rank, body in enumerate(reports) if body and (found := mismatch(body, draft))}
    if odd:
        shown = "; ".join(f"rank {rank} saves {what}" for rank, what in sorted(odd.items())[:8])
        raise RanksDisagree(
            f"step {draft.step} ({draft.kind}): {shown}. Every rank has to save the same steps of one "
            f"state; nothing was published"
        )
    _check_values(reports, draft.step)
    _check_replicas(reports, sample, draft.step)
    changed = [rank for rank, body in enumerate(reports) if body is None]
    if changed:
        raise PlanChanged(
            f"step {draft.step}: names or shapes changed on ranks {changed} alone, so this save was given up; the "
            f"next one is planned anew"
        )


def _check_replicas(reports: Sequence[Any], sample: ReplicaSample | None, step: int) -> None:
    if not any(body["replicas"] for body in reports if body) and _equal_where_shared(reports):
        return
    first: dict[tuple[str, bool], tuple[int, str]] = {}
    differing: dict[tuple[str, int], list[int]] = {}
    for rank, body in enumerate(reports):
        if not body:
            continue
        found = {(name, True): digest for name, digest in body["replicas"].items()}
        if sample is not None:
            sampled = named(sample.replicated, rank, json.loads(body["sample"]))
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


def _check_values(reports: Sequence[Any], step: int) -> None:
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


def mismatch(body: Mapping[str, Any], draft: Manifest) -> str | None:
    """Say in words what another rank's report saves, or return None where it saves the same as this rank."""
    if (body["step"], body["kind"]) != (draft.step, draft.kind):
        return f"step {body['step']} ({body['kind']})"
    if body["layout"] != draft.layout:
        return "another state (its names or shapes)"
    if tuple(body["names"]) != draft.names:
        return f"it under the names {list(body['names'])}"
    return f"into another attempt ({body['attempt']})" if body["attempt"] != draft.attempt else None


def _equal_where_shared(reports: Sequence[Any]) -> bool:
    """Return whether all ranks that have sampled the same copies have found the same."""
    first: dict[str, str] = {}
    return all(
        first.setdefault(name, digest) == digest for body in reports if body for name, digest in body["sampled"].items()
    )
