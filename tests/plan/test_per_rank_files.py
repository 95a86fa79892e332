"""Files by rank, without any process: every row once, by a rank that has it, and alike in what all say of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from plan.test_partition import shapes, spreads
from support.examples import examples

from asyncckpt import formats
from asyncckpt.codecs import codecs
from asyncckpt.plan.partition import Division
from asyncckpt.plan.per_rank_files import divide_by_rank
from asyncckpt.types import LayoutOptions, RowOwners, TensorSpec
from benchmarks.suites.ranks import simulation

OPTIONS = LayoutOptions(shard_bytes=6 << 20, extent_bytes=256 << 10)


def _divided(
    specs: Sequence[TensorSpec], held: Sequence[RowOwners], ranks: int, options: LayoutOptions = OPTIONS
) -> list[Division]:
    """Each rank's own division, as each computes it."""
    how = formats.get("safetensors"), codecs.get("none"), options
    found = []
    for rank in range(ranks):
        pairs = enumerate(zip(specs, held, strict=True))
        holdings = [simulation.holding(spec, rows, number, rank) for number, (spec, rows) in pairs]
        found.append(divide_by_rank((("m", tuple(specs)),), holdings, rank, ranks, *how))
    return found


def _rows(division: Division) -> list[tuple[str, int, int]]:
    """Which rows of which tensors a rank writes."""
    found = []
    for shard in division.layout.shards:
        for place in shard.placements:
            spec = place.part_of or place.spec
            begin = place.offsets[0] if place.offsets else 0
            found.append((spec.name, begin, begin + (place.spec.shape[0] if place.spec.shape else 1)))
    return found


def _uneven(count: int, ranks: int) -> RowOwners:
    """Parts of very different sizes: the first rank alone has the first row, all others have copies of the rest."""
    if count == 1 or ranks == 1:
        return RowOwners((0, count), ((0,),))
    return RowOwners((0, 1, count), ((0,), tuple(range(1, ranks))))


@examples(150, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(shapes, spreads | st.just("uneven")), min_size=1, max_size=12),
    st.sampled_from([2, 3, 4]),
    st.integers(1, 3),
)
def test_every_row_is_written_once_by_a_rank_that_has_it(
    tensors: list[tuple[tuple[int, ...], str]], parts: int, copies: int
) -> None:
    ranks = parts * copies
    specs = [simulation.spec_of(f"t{i}", shape) for i, (shape, _) in enumerate(tensors)]
    kept: dict[tuple[int, str], RowOwners] = {}
    held = []
    for spec, (_, spread) in zip(specs, tensors, strict=True):
        count = spec.shape[0] if spec.shape else 1
        whole = tuple(range(ranks)) if spread == "all" else (ranks - 1,)
        rows = RowOwners((0, count), (whole,))
        if spread == "rows" and count:
            rows = simulation.dealt(count, parts, copies)
        elif spread == "uneven" and count:
            rows = _uneven(count, ranks)
        held.append(kept.setdefault((count, spread), rows))
    divisions = _divided(specs, held, ranks)
    said = divisions[0].spread
    assert said is not None
    assert [one.layout for one in divisions] == [one.layout for one in _divided(specs, held, ranks)], "not pure"
    written: dict[str, list[tuple[int, int]]] = {}
    for rank, division in enumerate(divisions):
        assert division.spread is not None
        assert division.spread.tensors == said.tensors, "ranks say different things"
        for name, begin, end in _rows(division):
            written.setdefault(name, []).append((begin, end))
            spec, rows = next((s, r) for s, r in zip(specs, held, strict=True) if s.name == name)
            if not spec.nbytes:
                assert rank == 0
                continue
            part = rows.part_of_rank[rank]  # a KeyError: it writes what it does not have
            assert len(rows.holders) == 1 or rows.bounds[part] <= begin <= end <= rows.bounds[part + 1]
            one = said.tensors["m"][name]
            holders = said.spreads[one.spread].holders[part]
            assert rank in (holders if one.copies is None else holders[one.copies[0] : one.copies[1] + 1])
    for spec in specs:
        position = 0
        for begin, end in sorted(written[spec.name]):
            assert begin == position, f"{spec.name}: rows {'twice' if begin < position else 'never'} written"
            position = end
        assert position == (spec.shape[0] if spec.shape else 1)


def _loads(divisions: Sequence[Division]) -> list[int]:
    return [sum(shard.nbytes for shard in one.layout.shards) for one in divisions]


@pytest.mark.parametrize(("parts", "copies"), [(1, 8), (4, 2), (2, 4), (2, 16)])
def test_all_holders_write_as_much(parts: int, copies: int) -> None:
    """HSDP of a transformer: each part lies on several ranks."""
    specs = [simulation.spec_of("embed", (50257, 512))]
    for layer in range(8):
        specs += [
            simulation.spec_of(f"{layer}.{n}", shape) for n, shape in enumerate([(2048, 512), (512, 2048), (512,)])
        ]
    kept = {spec.shape[0]: simulation.dealt(spec.shape[0], parts, copies) for spec in specs}
    loads = _loads(_divided(specs, [kept[spec.shape[0]] for spec in specs], parts * copies))
    # tensors of one number of rows are divided together: three lines of bytes, in which nothing under 1 MiB is cut
    assert max(loads) <= 1.1 * sum(loads) / len(loads) + (1 << 20), loads


def test_what_is_small_is_not_spread_over_all() -> None:
    specs = [simulation.spec_of(f"step{number}", ()) for number in range(1000)]
    everywhere = RowOwners((0, 1), (tuple(range(4096)),))
    writers = {
        rank
        for rank in (0, 1, 2, 1000, 4095)
        if _rows(
            divide_by_rank(
                (("m", tuple(specs)),),
                [simulation.holding(spec, everywhere, number, rank) for number, spec in enumerate(specs)],
                *(rank, 4096, formats.get("safetensors"), codecs.get("none"), OPTIONS),
            )
        )
    }
    assert writers == {0}


def test_copies_of_parts_that_few_and_many_hold_are_divided_alike() -> None:
    """Pipeline stages with different numbers of replicas: what one stage's ranks hold is theirs alone to write."""
    specs = [simulation.spec_of(f"t{number}", (2048, 512)) for number in range(24)]
    held = [RowOwners((0, 1024, 2048), ((0, 1), (2, 3, 4, 5)))] * len(specs)
    loads = _loads(_divided(specs, held, 6))
    half = sum(spec.nbytes for spec in specs) // 2
    assert max(loads[:2]) <= 1.1 * half / 2
    assert max(loads[2:]) <= 1.1 * half / 4


def test_an_owner_writes_all_that_is_its_own() -> None:
    specs = [simulation.spec_of(f"t{number}", (512, 512)) for number in range(12)]
    loads = _loads(_divided(specs, [RowOwners((0, 512), ((2,),))] * len(specs), 4))
    assert [bool(load) for load in loads] == [False, False, True, False]


# -- what another number of ranks reads --------------------------------------------------------------------------------


def _read_by(specs: Sequence[TensorSpec], divisions: Sequence[Division], rank: int, ranks: int) -> float:
    """How much a rank reads that takes its rows as torch.chunk deals them out, of what these rows have."""
    digested: dict[tuple[str, int], int] = {}
    needed = 0
    by_name = {spec.name: spec for spec in specs}
    for division in divisions:
        for shard in division.layout.shards:
            edges = [0, shard.nbytes]
            for extent in shard.extents:
                edges += [extent.offset, *(extent.offset + cut for cut in extent.digest_boundaries)]
            edges = sorted(set(edges))
            for place in shard.placements:
                spec = by_name[(place.part_of or place.spec).name]
                rows, width = spec.shape[0], spec.nbytes // spec.shape[0]
                first = place.offsets[0] if place.offsets else 0
                begin, end = (min(rows, at * -(-rows // ranks)) for at in (rank, rank + 1))
                low, high = max(begin, first), min(end, first + place.spec.shape[0])
                if low >= high:
                    continue
                needed += (high - low) * width
                low, high = (place.begin + (at - first) * width for at in (low, high))
                for a, b in itertools.pairwise(edges):
                    if a < high and low < b:
                        digested[shard.file, a] = b - a
    return sum(digested.values()) / needed


@pytest.mark.parametrize(("saved_by", "restored_by"), [(64, 60), (64, 48), (64, 128), (64, 32), (8, 7), (8, 12)])
def test_another_number_of_ranks_reads_little_more_than_it_needs(saved_by: int, restored_by: int) -> None:
    """Extents of 8 MiB hold the parts of many tensors, and a digest covers few rows of one."""
    specs = [simulation.spec_of(f"{number}", (4096, 1024 << number % 3)) for number in range(12)]
    rows = simulation.dealt(4096, saved_by, 1)
    options = LayoutOptions(extent_bytes=8 << 20)
    divisions = _divided(specs, [rows] * len(specs), saved_by, options)
    for rank in (0, restored_by // 2, restored_by - 2):  # the last one may need few rows
        assert _read_by(specs, divisions, rank, restored_by) <= 1.1
