"""What several ranks restore alike is read once between them, and comes back bit for bit as when each reads it all."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import Crews, Me
from support.options import by_stage
from support.parallelisms import SIZES
from support.sharded_states import PARALLELISMS, build, contents, possible, scramble

import asyncckpt
from asyncckpt import RankOptions, RunOptions
from asyncckpt.ranks import shared_reading
from asyncckpt.storage.local import LocalStore
from asyncckpt.testing import InterceptedOps

_MIB = 1 << 20
_SHARED = RankOptions(timeout_seconds=30, shared_reading_bytes=0)
_ALONE = RankOptions(timeout_seconds=30, shared_reading_bytes=None)


class CountingOps(InterceptedOps):
    """Counts the bytes of data that were asked for, in ``nbytes``."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._lock = threading.Lock()

    def after(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "preadv":
            with self._lock:
                self.nbytes += len(args[1])


def _resumed(me: Me, path: str, state: dict[str, Any], ranks: RankOptions) -> int:
    """Resume, and return how many bytes of data this rank read from the storage."""
    ops = CountingOps()
    with asyncckpt.Checkpointer(path, ranks=ranks, run=RunOptions(store=LocalStore(path, ops=ops))) as run:
        assert run.resume(state) == 1
        return ops.nbytes


def _replicated(me: Me, path: str, parts: bool = False) -> tuple[int, int, int, bool]:
    """Save a state that all hold alike; return its bytes, what this rank reads of it together and alone, and whether
    it comes back as it was."""
    generator = torch.Generator().manual_seed(7)
    model = torch.nn.ParameterList(torch.randn(1000 + 37 * n, 300, generator=generator) for n in range(40))
    expected = [tensor.detach().clone() for tensor in model]
    in_parts = {"per_rank": True, "manifest_rows": 0} if parts else {}
    with asyncckpt.Checkpointer(path, **by_stage(ranks=_SHARED, **in_parts)) as run:
        run.save(1, {"model": model}).result(60)
    read = []
    good = True
    for ranks in (_SHARED, _ALONE):
        for tensor in model:
            tensor.data.fill_(-1.0)
        read.append(_resumed(me, path, {"model": model}, ranks))
        good = good and all(torch.equal(*pair) for pair in zip(expected, model, strict=True))
    return sum(tensor.nbytes for tensor in expected), read[0], read[1], good


@pytest.mark.parametrize("parts", [False, True], ids=["one manifest", "in parts"])
@pytest.mark.parametrize("size", [2, 4])
def test_copies_are_read_once_between_the_ranks(size: int, parts: bool, crews: Crews, tmp_path: Path) -> None:
    found = crews(size).values(_replicated, str(tmp_path / "run"), parts, timeout=120)
    nbytes = found[0][0]
    assert all(good for _, _, _, good in found)
    assert sum(read for _, _, read, _ in found) >= size * nbytes
    together = [read for _, read, _, _ in found]
    assert nbytes <= sum(together) <= 1.05 * nbytes
    assert max(together) <= 1.5 * nbytes / size, "one rank reads much more than its part"


def _as_alone(me: Me, path: str, way: str, form: str) -> list[str]:
    """Save; restore together, by the host's memory and by the process group, and alone; return the names of what came
    back differently."""
    state = build(way, me.rank, me.size)
    expected = contents(state)
    kind, _, codec = form.partition("/")
    how: dict[str, Any] = {"format": kind, "codec": codec}
    if form == "parts":
        how = {"per_rank": True, "manifest_rows": 0}
    with asyncckpt.Checkpointer(path, **by_stage(ranks=_SHARED, **how, **SIZES)) as run:
        run.save(1, state).result(60)
    wrong = []
    for ranks, hosts in ((_SHARED, 1), (_SHARED, me.size), (_ALONE, 1)):
        scramble(state)
        with pytest.MonkeyPatch.context() as monkeypatch:
            if hosts > 1:
                monkeypatch.setattr(shared_reading, "boot_id", lambda: str(me.rank))
            _resumed(me, path, state, ranks)
        found = contents(state)
        wrong += [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return wrong


_CELLS = [(size, way) for size in (2, 4) for way in PARALLELISMS if possible(way, size)]


@pytest.mark.parametrize(("size", "way"), _CELLS)
def test_every_parallelism_gets_back_what_it_saved(size: int, way: str, crews: Crews, tmp_path: Path) -> None:
    assert crews(size).values(_as_alone, str(tmp_path / "run"), way, "safetensors/none") == [[]] * size


@pytest.mark.parametrize(("size", "way"), [(2, "ddp"), (4, "fsdp2"), (4, "hsdp"), (4, "fsdp2+tp"), (2, "ep")])
def test_parts_of_a_manifest_give_back_what_was_saved(size: int, way: str, crews: Crews, tmp_path: Path) -> None:
    assert crews(size).values(_as_alone, str(tmp_path / "run"), way, "parts") == [[]] * size


def _pairs(me: Me, path: str, by_group: bool) -> tuple[int, int, bool]:
    """Save a state in which ranks 0 and 1 hold the same rows, as do 2 and 3. Return the bytes of these rows, what this
    rank reads of them together with the one that has the same, and whether they came back. ``by_group``: bytes pass
    through the process group, as between hosts."""
    pair, pairs = me.rank // 2, (me.size + 1) // 2
    generator = torch.Generator().manual_seed(pair)
    values = torch.randn(2000, 600, generator=generator)
    state = {"w": {"whole": asyncckpt.LocalShard(values.clone(), (2000 * pairs, 600), (2000 * pair, 0))}}
    with asyncckpt.Checkpointer(path, **by_stage(ranks=_SHARED, per_rank=True, manifest_rows=0)) as run:
        run.save(1, state).result(60)
    state["w"]["whole"].tensor.fill_(-1.0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if by_group:
            monkeypatch.setattr(shared_reading, "boot_id", lambda: str(me.rank))
        read = _resumed(me, path, state, _SHARED)
    return values.nbytes, read, torch.equal(state["w"]["whole"].tensor, values)


@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("size", [3, 4])
def test_ranks_that_hold_the_same_rows_read_them_once_between_them(
    size: int, by_group: bool, crews: Crews, tmp_path: Path
) -> None:
    found = crews(size).values(_pairs, str(tmp_path / "run"), by_group)
    assert all(good for _, _, good in found)
    nbytes = found[0][0]
    assert 2 * nbytes <= sum(read for _, read, _ in found) <= 1.1 * 2 * nbytes


@pytest.mark.parametrize("form", ["safetensors/planes", "zarr/none", "zarr/planes"])
def test_every_format_comes_back(form: str, crews: Crews, tmp_path: Path) -> None:
    assert crews(2).values(_as_alone, str(tmp_path / "run"), "ddp", form) == [[]] * 2
