"""In a job, the assets of rank 0 are the checkpoint's, and all ranks give a save the same names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from support.harness import Crews, Me
from support.options import by_stage
from support.parallelisms import SIZES, TIMEOUT

import asyncckpt


class _OfRank0:
    """Is there on rank 0 alone, as a tokenizer that only this rank has loaded."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def save_pretrained(self, folder: str) -> None:
        assert self._rank == 0, "only rank 0's are read"
        Path(folder, "tokenizer.json").write_text("{}")


def _state(rank: int, value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((900, 70), value)}, "own": {"rank": rank}}


def _saves(me: Me, path: str, options: dict[str, Any]) -> list[Any]:
    there = {"rank.txt": f"rank {me.rank}".encode(), "t": _OfRank0(me.rank)}
    found: list[Any] = []
    with asyncckpt.Checkpointer(path, assets=there, **by_stage(ranks=TIMEOUT, **SIZES, **options)) as run:
        run.save(1, _state(me.rank, 1.0), name="epoch=1").result(60)
        run.save(1, _state(me.rank, 2.0), name="last", assets={"own.txt": b"0" if me.rank == 0 else 7}).result(60)
        for name in ("epoch=1", "last"):
            state = _state(me.rank, 0.0)
            run.restore(state, name)
            found.append(float(state["model"]["w"][0, 0]))
        found.append({name: data.decode() for name, data in run.assets("last").items()})
        try:  # only rank 0 can find this out
            run.save(2, _state(me.rank, 3.0), assets={"m.safetensors": b""}).result(60)
        except asyncckpt.AsyncCkptError as error:
            found.append(type(error).__name__)
        try:
            run.save(3, _state(me.rank, 3.0), name=f"n{me.rank}").result(60)
        except asyncckpt.AsyncCkptError as error:
            found.append(f"{type(error).__name__}: {error}")
        run.save(4, _state(me.rank, 4.0)).result(60)
        return found


def test_rank_0s_assets_are_the_checkpoints_and_names_are_everyones(crews: Crews, tmp_path: Path) -> None:
    for number, options in enumerate(({}, {"format": "zarr"}, {"per_rank": True})):
        path = str(tmp_path / f"run-{number}")
        for rank, found in enumerate(crews(3).values(_saves, path, options)):
            *values, assets, refused, odd = found
            assert values == [1.0, 2.0]
            assert assets == {"rank.txt": "rank 0", "tokenizer.json": "{}", "own.txt": "0"}
            assert refused == "InvalidOption", rank
            assert odd.startswith("RanksDisagree"), odd
            assert "under the names" in odd
        run = asyncckpt.Run(path)
        assert [(entry.step, entry.names) for entry in run.ls()] == [(1, ("epoch=1",)), (1, ("last",)), (4, ())]
        assert all(run.verify(which) == [] for which in ("epoch=1", "last", 4))
        assert not [name for name in os.listdir(path) if name.startswith(".tmp")]


def _restore_the_last(me: Me, path: str) -> str:
    with asyncckpt.Checkpointer(path, **by_stage(ranks=TIMEOUT)) as run:
        run.save(1, _state(me.rank, 1.0), name="last").result(60)
        if me.rank:  # this rank looks before the other's save is there
            catalog = asyncckpt.restoring.Catalog
            real = catalog.find_open
            catalog.find_open = lambda self, step, kind=None: real(self, "last", kind)  # type: ignore[method-assign]
        run.save(2, _state(me.rank, 2.0), name="best").result(60)
        try:
            run.restore(_state(me.rank, 0.0), "best")
        except asyncckpt.AsyncCkptError as error:
            return type(error).__name__
        finally:
            if me.rank:
                catalog.find_open = real  # type: ignore[method-assign]
    return "restored"


def test_ranks_that_see_another_checkpoint_under_a_name_restore_nothing(crews: Crews, tmp_path: Path) -> None:
    assert crews(2).values(_restore_the_last, str(tmp_path / "run")) == ["RanksDisagree"] * 2
