"""Which layout a job gets where nobody chooses: common files, or files of one rank each."""

from __future__ import annotations

import dataclasses

import pytest

from asyncckpt.plan.partition import RankHolding
from asyncckpt.plan.per_rank_files import suits
from asyncckpt.types import LayoutOptions, RowOwners
from benchmarks.suites.ranks.simulation import spec_of
from benchmarks.suites.scale.models import Job, components, holdings, llama

SMALL = ("8B", lambda: llama(32, 4096, 14_336, 128_256))
LARGE = ("70B", lambda: llama(80, 8192, 28_672, 128_256))
HUGE = ("405B", lambda: llama(126, 16_384, 53_248, 128_256))


@pytest.mark.parametrize(
    ("job", "by_rank"),
    [
        (Job(*SMALL, 8), False),
        (Job(*SMALL, 64), False),
        (Job(*SMALL, 1024), True),
        (Job(*LARGE, 64), False),
        (Job(*LARGE, 1024), True),
        (Job(*HUGE, 4096), True),
        (Job(*HUGE, 4096, copies=64), True),
    ],
    ids=lambda one: f"{one.name} on {one.ranks}" if isinstance(one, Job) else "",
)
def test_small_pieces_of_many_ranks_go_into_files_by_rank(job: Job, by_rank: bool) -> None:
    known = components(job.shapes())
    specs = [spec for _, found in known for spec in found]
    said = {suits(known, holdings(job, specs, rank), LayoutOptions(by_rank=None)) for rank in (0, 5, job.ranks - 1)}
    assert said == {by_rank}


def test_what_files_by_rank_cannot_hold_stays_in_common_files() -> None:
    job = Job(*LARGE, 1024)
    known = components(job.shapes())
    specs = [spec for _, found in known for spec in found]
    held = holdings(job, specs, 0)
    elements = specs[0].nbytes // 4
    cut = RowOwners((0, elements // 2, elements), ((0,), (1,)))
    assert not suits(known, [RankHolding(cut, 0, 0), *held[1:]], LayoutOptions()), "a rank holds half a row"
    named = dataclasses.replace(specs[0], file="adapter_model.safetensors")
    first = known[0][0], (named, *known[0][1][1:])
    assert not suits((first, *known[1:]), held, LayoutOptions()), "a file of another name"


def test_nothing_to_store_has_common_files() -> None:
    assert not suits(
        (("m", (spec_of("w", (0, 5)),)),), [RankHolding(RowOwners((0, 0), ((0,),)), 0, 0)], LayoutOptions()
    )
