"""Any number of ranks on any mesh restores what any other number saved: in place, bit-equal, reading its part alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.harness import Crews, Me
from support.options import by_stage
from support.parallelisms import SIZES, TIMEOUT
from support.sharded_states import build, contents, needed_bytes, possible, scramble
from torch import nn

import asyncckpt

#: Bytes a rank may read, of what lies on it.
MOST = 1.10


def _save(me: Me, path: str, way: str, options: dict[str, Any]) -> None:
    state = build(way, me.rank, me.size)
    _seed(me.rank)
    with asyncckpt.Checkpointer(path, **by_stage(ranks=TIMEOUT, **options)) as run:
        run.save(7, state).result(60)


def _seed(rank: int) -> None:
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(100 + rank)


def _position(states: list[Any], rank: int, _size: int) -> Any:
    """The position of rank 0 for a rank whose own was not saved."""
    return states[rank if rank < len(states) else 0]


def _restore(me: Me, path: str, way: str, options: dict[str, Any], saved_by: int) -> list[str]:
    """Names of what is not as it was saved."""
    state = build(way, me.rank, me.size)
    held = [tensor.data_ptr() for tensor in _tensors(state)]
    _seed(me.rank)
    state["loader"].position = 1000 + (me.rank if me.rank < saved_by else 0)
    expected = contents(state)
    scramble(state)
    ruled = state | {"loader": asyncckpt.PerRank(state["loader"], _position)}
    with asyncckpt.Checkpointer(path, **by_stage(ranks=TIMEOUT, **options)) as run:
        assert run.resume(ruled) == 7
    found = contents(state)
    if me.rank >= saved_by:  # whose own random numbers were not saved draws others: test_other_sizes.py
        expected = {name: value for name, value in expected.items() if not name.startswith("/rng")}
    moved = ["memory moved"] if held != [tensor.data_ptr() for tensor in _tensors(state)] else []
    return moved + [name for name in expected if found.get(name) != expected[name]]


def _tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    """Those that have to keep their place: whoever trains holds them too."""
    if "weights" in state:
        return [shard.tensor for shard in state["weights"]["parts"].values()]
    return [p.to_local() if hasattr(p, "to_local") else p for p in state["model"].parameters()]


#: Who saves, who restores: every kind of mesh on either side. All pairs are slow: see below.
SAMPLE = [
    (1, "ddp", 4, "fsdp2+tp"),
    (2, "tp", 1, "ddp"),
    (2, "ep", 3, "fsdp2"),
    (2, "fsdp2", 4, "hsdp"),
    (3, "fsdp2", 2, "ddp"),
    (3, "pp", 4, "fsdp2"),
    (4, "fsdp2+tp", 3, "pp"),
    (2, "shards", 3, "shards"),
    (4, "shards", 1, "shards"),
]
WAYS = [(size, way) for way in ("ddp", "fsdp2", "hsdp", "tp", "fsdp2+tp", "ep", "pp") for size in (1, 2, 3, 4)]
WAYS = [(size, way) for size, way in WAYS if possible(way, size) or (size == 1 and way == "ddp")]
SHARDS = [(size, "shards") for size in (1, 2, 3, 4)]
EVERY = [(*a, *b) for ways in (WAYS, SHARDS) for a in ways for b in ways]


def _there_and_back(crews: Crews, path: str, case: tuple[int, str, int, str], options: dict[str, Any]) -> None:
    saved_by, way, restored_by, other = case
    crews(saved_by).values(_save, path, way, options)
    wrong = crews(restored_by).values(_restore, path, other, options, saved_by)
    assert not any(wrong), f"{saved_by} ranks ({way}) to {restored_by} ({other}): {wrong}"


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: f"{case[0]}-{case[1]}-to-{case[2]}-{case[3]}")
def test_restored_elsewhere_everything_is_bit_equal(
    case: tuple[int, str, int, str], crews: Crews, tmp_path: Path
) -> None:
    _there_and_back(crews, str(tmp_path / "run"), case, dict(SIZES))


def test_chunks_go_anywhere_too(crews: Crews, tmp_path: Path) -> None:
    options = {**SIZES, "format": "zarr", "codec": "planes"}
    _there_and_back(crews, str(tmp_path / "run"), (3, "fsdp2", 4, "fsdp2+tp"), options)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("form", ["safetensors/none", "zarr/planes"])
def test_from_anywhere_to_anywhere(form: str, crews: Crews, tmp_path: Path) -> None:
    kind, _, codec = form.partition("/")
    options = {**SIZES, "format": kind, "codec": codec}
    cases = [case for case in EVERY if codec == "none" or "shards" not in case]
    saved: dict[tuple[int, str], str] = {}
    for saved_by, way, restored_by, other in sorted(cases, key=lambda case: (case[2], case[0])):
        path = saved.setdefault((saved_by, way), str(tmp_path / f"{way}-{saved_by}"))
        if not Path(path).exists():
            crews(saved_by).values(_save, path, way, options)
        wrong = crews(restored_by).values(_restore, path, other, options, saved_by)
        assert not any(wrong), f"{saved_by} ranks ({way}) to {restored_by} ({other}): {wrong}"


# -- bytes -----------------------------------------------------------------------------------------------------------


def _wide(me: Me, way: str) -> dict[str, Any]:
    """Tensors of the sizes that jobs of many ranks have: some MB each."""
    from support.sharded_states import _fsdp, _optimizer

    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(1024, 1536), nn.Linear(1536, 1000), nn.Linear(1000, 1031, bias=False))
    if way == "fsdp2" and me.size > 1:
        from torch.distributed.device_mesh import init_device_mesh

        model = _fsdp(model, init_device_mesh("cpu", (me.size,)))
    return {"model": model, "optimizer": _optimizer(model)}


def _save_wide(me: Me, path: str, way: str) -> None:
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        run.save(1, _wide(me, way)).result(60)


def _read_wide(me: Me, path: str, way: str) -> tuple[int, int]:
    """Bytes read, bytes needed."""
    state = _wide(me, way)
    with asyncckpt.Checkpointer(path, ranks=TIMEOUT) as run:
        opened = run._store.open
        counted: list[int] = []

        def open_counting(name: str) -> Any:
            reader = opened(name)
            read_into = reader.read_into

            def read(file: str, buffer: Any, nbytes: int, offset: int) -> int:
                counted.append(nbytes)
                return read_into(file, buffer, nbytes, offset)

            reader.read_into = read
            return reader

        run._store.open = open_counting  # type: ignore[method-assign]
        report = run.restore(state)
    # O_DIRECT reads whole blocks: the file system's view, never much more than the report's
    assert report.nbytes <= sum(counted) <= report.nbytes + 8192 * len(counted)
    return max(report.nbytes, sum(counted)), needed_bytes(state)


@pytest.mark.parametrize(("saved_by", "restored_by"), [(1, 4), (2, 3), (4, 2)])
def test_a_rank_reads_little_more_than_its_part(saved_by: int, restored_by: int, crews: Crews, tmp_path: Path) -> None:
    crews(saved_by).values(_save_wide, str(tmp_path / "run"), "fsdp2")
    found = crews(restored_by).values(_read_wide, str(tmp_path / "run"), "fsdp2")
    ratios = [round(read / needed, 3) for read, needed in found]
    assert max(ratios) <= MOST, f"bytes read by each rank against its part: {ratios}"


# -- one step for all ------------------------------------------------------------------------------------------------


def _save_steps(me: Me, path: str, steps: tuple[int, ...]) -> None:
    with asyncckpt.Checkpointer(path, **by_stage(ranks=TIMEOUT, incremental=False, **SIZES)) as run:
        for step in steps:
            state = build("fsdp2", me.rank, me.size)
            state["epoch"]["n"] = step
            run.save(step, state).result(60)


def _resume(me: Me, path: str, blind: dict[int, tuple[int, ...]], sick: tuple[int, int] | None) -> tuple[int, int]:
    """Resume where rank r does not see the steps ``blind[r]``, and where reading fails on rank ``sick[0]`` of step
    ``sick[1]``; the step, and the one the restored state says it is of."""
    import errno
    import warnings

    state = build("fsdp2", me.rank, me.size)
    scramble(state)
    with asyncckpt.Checkpointer(path, **by_stage(ranks=TIMEOUT, **SIZES)) as run:
        names, opened = run._store.names, run._store.open
        hidden = {f"step-{step:08d}" for step in blind.get(me.rank, ())}

        def open_sick(name: str) -> Any:
            reader = opened(name)
            if sick is not None and me.rank == sick[0] and name == f"step-{sick[1]:08d}":

                def fail(*_: object) -> int:
                    raise OSError(errno.EIO, "no such sector")

                reader.read_into = fail
            return reader

        run._store.names = lambda: [name for name in names() if name not in hidden]  # type: ignore[method-assign]
        run._store.open = open_sick  # type: ignore[method-assign]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = run.resume(state)
    return step, state["epoch"]["n"]


def test_ranks_that_see_different_checkpoints_resume_from_one(crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    crew = crews(3)
    crew.values(_save_steps, path, (1, 2, 3))
    # rank 0 decides; a rank that cannot see what it has chosen makes all of them go back
    assert crew.values(_resume, path, {1: (1,)}, None) == [(3, 3)] * 3
    assert crew.values(_resume, path, {0: (3,)}, None) == [(2, 2)] * 3


def test_damage_that_one_rank_sees_sends_all_back(crews: Crews, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    crew = crews(3)
    crew.values(_save_steps, path, (1, 2, 3))
    assert crew.values(_resume, path, {}, (2, 3)) == [(2, 2)] * 3


def test_damage_on_the_disk_in_one_ranks_rows_sends_all_back(crews: Crews, tmp_path: Path) -> None:
    path = tmp_path / "run"
    crew = crews(4)
    crew.values(_save_steps, str(path), (1, 2))
    file = path / "step-00000002" / "model-00001-of-00001.safetensors"
    file = file if file.exists() else sorted((path / "step-00000002").glob("model-*.safetensors"))[-1]
    data = bytearray(file.read_bytes())
    data[-5000] ^= 16  # in the last rows of the last tensor
    file.write_bytes(data)
    assert crew.values(_resume, str(path), {}, None) == [(1, 1)] * 4
