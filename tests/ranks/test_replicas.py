"""Copies of one tensor on several ranks: buffers may differ and come from one rank, all others must be equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples
from support.harness import Crews, Me
from support.options import by_stage
from support.parallelisms import SIZES, TIMEOUT
from torch import nn

import asyncckpt
from asyncckpt.plan.planned import ReplicatedTensor
from asyncckpt.ranks import replicas
from asyncckpt.types import LocalTensor, RowOwners, TensorSpec


class _Wide(nn.Module):
    """Has buffers so large that, were they copies, several ranks would write parts of them."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(900, 700))
        self.norm = nn.BatchNorm1d(700)
        self.norm.running_mean.fill_(rank)
        self.norm.num_batches_tracked.fill_(10 + rank)
        self.register_buffer("cache", torch.full((900, 900), float(rank)))
        self.register_buffer("turned", torch.full((20, 30), float(rank)).t())

    def get_extra_state(self) -> dict[str, Any]:
        return {"batches": int(self.norm.num_batches_tracked), "rows": torch.full((4,), float(self.cache[0, 0]))}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.extra = state


def _save_wide(me: Me, path: str) -> None:
    for number, options in enumerate(({}, {"codec": "planes"}, {"format": "zarr"}, {"per_rank": True})):
        model = _Wide(me.rank)
        with asyncckpt.Checkpointer(f"{path}-{number}", **by_stage(ranks=TIMEOUT, **SIZES, **options)) as run:
            for step in (1, 2):
                run.save(step, {"model": model}).result(60)
            restored = _Wide(5)
            run.restore({"model": restored})
            for buffer in (restored.cache, restored.turned, restored.norm.running_mean):
                assert buffer.unique().tolist() == [0]
            assert restored.norm.num_batches_tracked == restored.extra["batches"] == 10
            assert restored.extra["rows"].tolist() == [0] * 4


def test_buffers_that_differ_are_those_of_the_first_rank(crews: Crews, tmp_path: Path) -> None:
    crews(2).values(_save_wide, str(tmp_path / "run"))
    for number in range(4):
        assert asyncckpt.Run(f"{tmp_path}/run-{number}").verify(2) == []


def _buffers_of_a_stage(me: Me, path: str) -> list[float]:
    """Ranks 1 and 2 have copies of a stage that rank 0 has not."""
    model = nn.ModuleDict({"head" if me.rank else "tail": nn.BatchNorm1d(3)})
    for buffer in model.buffers():
        buffer.fill_(me.rank)
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        run.save(1, {"model": model}).result(60)
        run.restore({"model": model})
    return [float(buffer.sum()) for buffer in model.buffers()]


def test_the_first_rank_is_the_first_that_has_the_buffer(crews: Crews, tmp_path: Path) -> None:
    found = crews(3).values(_buffers_of_a_stage, str(tmp_path / "run"))
    assert found == [[0.0] * 3, [3.0, 3.0, 1.0], [3.0, 3.0, 1.0]]


def _outcome(run: asyncckpt.Checkpointer, step: int, state: dict[str, Any]) -> str:
    try:
        error = run.save(step, state).exception(60)
    except asyncckpt.AsyncCkptError as raised:
        error = raised
    return f"{type(error).__name__}: {error}"


def _copies(me: Me, path: str) -> list[str]:
    """Save a model with an average that rank 0 alone has updated, and other copies that differ."""
    torch.manual_seed(0)
    model, average = nn.Linear(30, 30), nn.Linear(30, 30)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    if me.rank == 0:
        nn.init.ones_(average.weight)
    found: list[str] = []
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        run.watch(optimizer)
        found.append(_outcome(run, 1, {"model": model, "average": average, "optimizer": optimizer}))
        plain = {"model": model, "optimizer": optimizer, "shadow": torch.full((5, 5), float(me.rank))}
        found.append(_outcome(run, 2, plain))
        held = {name: tensor.detach().clone() + me.rank for name, tensor in model.named_parameters()}
        found.append(_outcome(run, 3, {"model": model, "held": asyncckpt.Replicated(held)}))
        if me.rank:
            optimizer.state[model.bias]["exp_avg"].add_(1)
        found.append(_outcome(run, 4, {"model": model, "optimizer": optimizer}))
        owned = {
            "model": model,
            "optimizer": asyncckpt.Owner(optimizer),
            "average": asyncckpt.Owner(average, rank=1),
            "shadow": asyncckpt.Owner(plain["shadow"], rank=1),
            "counters": asyncckpt.Owner({"from": me.rank}, rank=1),
            "note": asyncckpt.Owner(f"rank {me.rank}", rank=1),
        }
        found.append(_outcome(run, 5, owned))
        before = average.weight.clone()
        optimizer.state[model.bias]["exp_avg"].fill_(7)
        run.restore(owned, step=5)
        right = torch.nn.Linear(30, 30).weight
        found.append(str(bool((average.weight == before).all()) == (me.rank == 1) and right.shape == before.shape))
        found.append(str([plain["shadow"].unique().tolist(), owned["counters"].value, owned["note"].value]))
        found.append(f"{float(optimizer.state[model.bias]['exp_avg'].mean()):.3f}")
    return found


def test_copies_that_differ_are_told_unless_one_rank_owns_them(crews: Crews, tmp_path: Path) -> None:
    first, second = crews(2).values(_copies, str(tmp_path / "run"))
    assert first == second
    names = ["average.weight", "shadow.value", "held.value.", "optimizer.state.bias.exp_avg"]
    for text, name in zip(first, names, strict=False):
        way_out = f"{name.partition('.')[0]!r}: asyncckpt.Owner("
        assert all(part in text for part in ("RanksDisagree: ", name, "on ranks [1]", way_out)), text
    assert first[4:] == ["NoneType: None", "True", "[[1.0], {'from': 1}, 'rank 1']", "0.100"]
    assert [entry.step for entry in asyncckpt.Run(tmp_path / "run").ls()] == [5]


def _replicas_of_shards(me: Me, path: str) -> str:
    """Two replicas of two shards each: rank 3 has another copy of the rows that rank 1 has too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2))
    value = distribute_tensor(torch.arange(24.0).view(6, 4), mesh, [Replicate(), Shard(0)])
    if me.rank == 3:
        value.to_local()[0, 0] += 1
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        return _outcome(run, 1, {"value": value})


def test_copies_of_parts_are_compared_too(crews: Crews, tmp_path: Path) -> None:
    found = crews(4).values(_replicas_of_shards, str(tmp_path / "run"))
    assert all("value.value[3:6] on ranks [3] from rank 1's" in text for text in found), found


def _odd_owners(me: Me, path: str) -> list[str]:
    value = {"a": 1}
    states: list[dict[str, Any]] = [
        {"x": asyncckpt.Owner(value, rank=me.rank)},
        {"x": asyncckpt.Owner(value, rank=2)},
        {"x": asyncckpt.Owner(value, rank=1)} if me.rank == 0 else {"y": 1},
    ]
    found = []
    for step, state in enumerate(states):
        run = asyncckpt.Checkpointer(f"{path}-{step}", ranks=TIMEOUT)
        found.append(_outcome(run, step, state))
        dist.barrier()
    return found


def test_owners_that_cannot_be_are_refused(crews: Crews, tmp_path: Path) -> None:
    for found in crews(2).values(_odd_owners, str(tmp_path / "run")):
        kinds = [text.partition(":")[0] for text in found]
        assert kinds == ["RanksDisagree", "InvalidOption", "RanksDisagree"], found
        assert "Owner(…, rank=2), but the job has 2 ranks" in found[1]
    for rank in (-1, True, 1.0):
        with pytest.raises(asyncckpt.InvalidOption, match="rank's number"):
            asyncckpt.Owner({}, rank=rank)  # type: ignore[arg-type]


def test_a_process_alone_needs_no_owner(tmp_path: Path) -> None:
    state = {"x": asyncckpt.Owner({"a": 1}, rank=3), "w": asyncckpt.Owner(nn.Linear(2, 2)), "n": asyncckpt.Owner(3)}
    with asyncckpt.Checkpointer(tmp_path / "run") as run:
        run.save(1, state).result()
        state["n"].value = state["x"].value["a"] = 0
        run.restore(state)
    assert (state["x"].value, state["n"].value) == ({"a": 1}, 3)


# -- which bytes are sampled -----------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=40),
    most=st.integers(1, 12),
    sample=st.sampled_from([64, 1000, 20_000]),
)
@examples(60)
def test_all_bytes_of_all_copies_have_their_turn(sizes: list[int], most: int, sample: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "MOST_TENSORS", most)
        patch.setattr(replicas, "SAMPLE_BYTES", sample)
        pieces, held = [], []
        for index, size in enumerate(sizes):
            spec = TensorSpec(str(index), "U8", (size,), size)
            pieces.append(LocalTensor(spec, torch.zeros(size, dtype=torch.uint8)))
            held.append(ReplicatedTensor("m", spec, RowOwners((0, size), ((0, 1),)), index))
        left = [set(range(size)) for size in sizes]
        saves = 0
        while any(left):
            ranges = replicas._ranges(held, pieces, saves, 0)
            assert ranges == replicas._ranges(held, pieces, saves, 1), "ranks sample other bytes"
            assert len(ranges) <= most
            assert sum(one.nbytes for one in ranges) <= max(sample, 64 * most)
            for one in ranges:
                left[int(one.key)] -= set(range(one.begin, one.begin + one.nbytes))
            saves += 1
            assert saves < 40 * 5000, "some bytes are never sampled"


_GPU = (pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=_GPU)])
def test_a_sample_has_the_bytes_that_the_tensor_had(device: str) -> None:
    from asyncckpt.codecs import digests
    from asyncckpt.plan.planned import Planned
    from asyncckpt.types import Layout

    whole = torch.arange(600, dtype=torch.int32, device=device).view(20, 30)
    tensors = [whole, whole.t(), whole.to(torch.bfloat16), torch.arange(100.0, device=device)[::2], whole[:0]]
    pieces, held = [], []
    for index, tensor in enumerate(tensors):
        spec = TensorSpec(str(index), "?", tuple(tensor.shape), tensor.nbytes)
        rows = RowOwners((0, tensor.shape[0]), ((0, 1),))
        pieces.append(LocalTensor(spec, tensor))
        if tensor.numel():
            held.append(ReplicatedTensor("m", spec, rows, index))
    layout = Layout((), 0, "")
    sample = replicas.ReplicaSample(Planned(1, pieces, layout, [], {}, frozenset(), replicated=held), 0, 0)
    expected = {
        str(index): digests.get(digests.DEFAULT)(one.cpu().contiguous().view(torch.uint8).numpy().tobytes())[:16]
        for index, one in enumerate(tensors[:4])
    }
    whole.zero_()  # what is done after the save was asked for
    assert sample.digests() == ({}, expected)


def _last_save(me: Me, path: str) -> list[int]:
    """Save a small replicated model, deferred, again and again, with no step after the last; return what is there."""
    torch.manual_seed(3)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    with asyncckpt.Checkpointer(path, ranks=asyncckpt.RankOptions(timeout_seconds=10)) as run:
        run.watch(optimizer)
        for step in range(1, 5):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            run.save(step, {"model": model, "optimizer": optimizer})
    return [entry.step for entry in asyncckpt.Run(path).ls()]


def test_a_rank_that_copies_nothing_keeps_no_save_waiting(crews: Crews, tmp_path: Path) -> None:
    """So small a state is rank 0's alone to write, and the last save has no update after it that would judge it."""
    assert crews(2).values(_last_save, str(tmp_path / "run")) == [[1, 2, 3, 4]] * 2
