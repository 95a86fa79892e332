"""Who writes which bytes, without any process: every byte once, evenly, alike on every rank; what planning costs."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from support.examples import examples

from asyncckpt import formats
from asyncckpt.codecs import codecs
from asyncckpt.plan import layout
from asyncckpt.plan.partition import Division, divide
from asyncckpt.ranks import tables
from asyncckpt.types import ALIGNMENT_BYTES, Layout, LayoutOptions, RowOwners, TensorSpec
from benchmarks.suites.ranks import simulation
from benchmarks.suites.ranks.simulation import simulate

OPTIONS = LayoutOptions(shard_bytes=6 << 20, extent_bytes=256 << 10)


def _layout(specs: Sequence[TensorSpec], options: LayoutOptions = OPTIONS) -> Layout:
    components = (("m", tuple(specs)),)
    return layout.plan(components, formats.get("safetensors"), codecs.get("none"), options)


def _parts(plan: Layout, specs: Sequence[TensorSpec], held: Sequence[RowOwners], ranks: int) -> list[Division]:
    """Each rank's own division, as each computes it."""
    found = []
    for rank in range(ranks):
        holdings = [
            simulation.holding(spec, rows, i, rank) for i, (spec, rows) in enumerate(zip(specs, held, strict=True))
        ]
        found.append(divide(plan, holdings, rank, OPTIONS.extent_bytes))
    return found


shapes = st.one_of(
    st.just(()),
    st.tuples(st.sampled_from([0, 1, 2, 3, 5, 17, 768])),
    st.tuples(st.sampled_from([1, 2, 3, 7, 1000, 1031, 4096]), st.sampled_from([0, 1, 5, 130, 1024])),
)
spreads = st.sampled_from(["rows", "rows", "all", "some"])


@examples(150, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(shapes, spreads), min_size=1, max_size=12), st.sampled_from([2, 3, 4, 8]), st.integers(1, 2))
def test_every_byte_is_written_once_by_a_rank_that_has_it(
    tensors: list[tuple[tuple[int, ...], str]], parts: int, copies: int
) -> None:
    ranks = parts * copies
    specs = [simulation.spec_of(f"t{i}", shape) for i, (shape, _) in enumerate(tensors)]
    plan = _layout(specs)
    held = []
    for spec, (_, spread) in zip(specs, tensors, strict=True):
        count = spec.shape[0] if spec.shape else 1
        whole = tuple(range(ranks)) if spread == "all" else (ranks - 1,)
        held.append(
            simulation.dealt(count, parts, copies) if spread == "rows" and count else RowOwners((0, count), (whole,))
        )
    divisions = _parts(plan, specs, held, ranks)
    again = _parts(plan, specs, held, ranks)
    assert [one.layout for one in divisions] == [one.layout for one in again], "not a pure function"
    for number, shard in enumerate(plan.shards):
        written = []
        for rank, division in enumerate(divisions):
            for extent in division.layout.shards[number].extents:
                written.append((extent.offset, extent.offset + extent.nbytes))
                assert extent.nbytes <= OPTIONS.extent_bytes
                assert extent.block_offset == extent.offset % ALIGNMENT_BYTES or not extent.block_offset
                assert all(0 < cut < extent.nbytes for cut in extent.digest_boundaries)
                for segment in extent.segments:
                    rows, spec = held[segment.piece], specs[segment.piece]
                    part = rows.part_of_rank[rank]  # a KeyError: it writes what it does not have
                    width = spec.nbytes // rows.bounds[-1]
                    lies_here = (rows.bounds[part + 1] - rows.bounds[part]) * width
                    assert 0 <= segment.source_offset <= segment.source_offset + segment.nbytes <= lies_here
        position = 0
        for begin, end in sorted(written):
            assert begin == position, f"{shard.file}: {'twice' if begin < position else 'never'} written"
            position = end
        assert position == shard.nbytes


def _loads(divisions: Sequence[Division]) -> list[int]:
    return [sum(extent.nbytes for extent in one.layout.extents()) for one in divisions]


def test_copies_are_divided_evenly() -> None:
    """The tensors of a transformer, on every rank."""
    specs = [simulation.spec_of("t0", (50257, 64))]
    for _ in range(6):
        for shape in ((256, 64), (64,), (64, 64), (768, 512), (512, 768), (768,), (768,)):
            specs.append(simulation.spec_of(f"t{len(specs)}", shape))
    plan = _layout(specs)
    for ranks in (2, 3, 4, 8):
        held = [RowOwners((0, spec.shape[0]), (tuple(range(ranks)),)) for spec in specs]
        loads = _loads(_parts(plan, specs, held, ranks))
        assert max(loads) <= 1.05 * sum(loads) / ranks, (ranks, loads)


def test_rows_on_two_groups_of_ranks_are_divided_between_both() -> None:
    """HSDP: each part lies on two ranks."""
    specs = [simulation.spec_of(f"t{i}", (4096, 1024)) for i in range(4)]
    held = [simulation.dealt(4096, 4, 2) for _ in specs]
    loads = _loads(_parts(_layout(specs), specs, held, 8))
    assert max(loads) <= 1.05 * sum(loads) / 8, loads


def test_ten_thousand_tensors_of_1024_ranks_are_planned_in_seconds_once_and_in_milliseconds_then() -> None:
    """No processes: what one rank of 1,024 computes for FSDP, and what it looks up at the saves that follow. The bounds
    are an order of magnitude above what was measured: 0.6 s, 25 MB, 3 ms."""
    found = simulate(10_000, 1024, 700)
    assert found.once_seconds < 15
    assert found.again_seconds < 0.1
    assert 0.5 / 1024 < found.share < 1.5 / 1024
    assert found.grown_bytes < 256 << 20, f"{found.grown_bytes >> 20} MiB for one plan"


def test_a_tables_digest_is_what_travels_where_all_ranks_hold_alike() -> None:
    """Not 1,024 tables of 10,000 rows: rows are listed once, and the digest is 32 characters."""
    from asyncckpt.types import ComponentSnapshot, LocalTensor

    specs = simulation.model(10_000)
    dealt = {rows: simulation.dealt(rows, 1024, 1) for rows in {spec.shape[0] for spec in specs}}
    pieces = [LocalTensor(spec, None, 0, dealt[spec.shape[0]]) for spec in specs]  # type: ignore[arg-type]
    table = tables.table_of(ComponentSnapshot("m", "module", pieces, {}, None))
    assert len(table["rows"]) == len(dealt)
    assert len(tables.digest_of(table)) == 32
