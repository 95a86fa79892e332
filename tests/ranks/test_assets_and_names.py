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


def _restore_what_rank_0_sees(me: Me, path: str, shown: str) -> str:
    """Restore step 2 while the storage shows rank 1 ``shown`` under its name. Return what came back, or the error."""
    with asyncckpt.Checkpointer(path, **by_stage(ranks=TIMEOUT)) as run:
        run.save(1, _state(me.rank, 1.0)).result(60)
        run.save(2, _state(me.rank, 2.0), name="best").result(60)
        real = run._store.open
        if me.rank and shown:
            run._store.open = lambda name: real(shown if name == "step-00000002" else name)  # type: ignore[method-assign]
        if me.rank:  # what this rank would find by itself does not matter
            run._store.names = lambda: ["step-00000001"]  # type: ignore[method-assign]
        state = _state(me.rank, 0.0)
        try:
            run.restore(state, "best")
        except asyncckpt.AsyncCkptError as error:
            return type(error).__name__
        return str(float(state["model"]["w"][0, 0]))


def test_a_name_means_on_all_ranks_what_it_means_to_rank_0(crews: Crews, tmp_path: Path) -> None:
    found = crews(2).values(_restore_what_rank_0_sees, str(tmp_path / "run"), "")
    assert found == ["2.0"] * 2


def test_ranks_that_see_another_checkpoint_under_a_name_restore_nothing(crews: Crews, tmp_path: Path) -> None:
    found = crews(2).values(_restore_what_rank_0_sees, str(tmp_path / "run"), "step-00000001")
    assert found == ["RanksDisagree"] * 2


def _restore_different_steps(me: Me, path: str) -> str:
    with asyncckpt.Checkpointer(path, **by_stage(ranks=TIMEOUT)) as run:
        for step in (1, 2):
            run.save(step, _state(me.rank, float(step))).result(60)
        try:
            run.restore(_state(me.rank, 0.0), 1 + me.rank)
        except asyncckpt.AsyncCkptError as error:
            return str(error)
    return "restored"


def test_ranks_that_are_asked_for_different_steps_restore_nothing(crews: Crews, tmp_path: Path) -> None:
    for said in crews(2).values(_restore_different_steps, str(tmp_path / "run")):
        assert "rank 0 restores 1, and rank 1 2" in said
