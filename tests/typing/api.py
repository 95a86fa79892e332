"""What a user may write, for the type checker alone: mypy checks this file, nothing runs it.

A line with ``type: ignore`` is one that has to be refused: mypy says so where it is not (``warn_unused_ignores``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import assert_type

import torch

import asyncckpt
from asyncckpt import (
    Checkpointer,
    CheckpointInfo,
    Damage,
    Delta,
    KeepBest,
    KeepLast,
    LeaseOptions,
    Minutes,
    PendingSave,
    Preemption,
    RankOptions,
    RestoreReport,
    Run,
    RunOptions,
    Safetensors,
    SaveReport,
    StagingOptions,
    Steps,
    WriterOptions,
    Zarr,
)
from asyncckpt.codecs import Planes
from asyncckpt.events import Committed, Event


def heard(event: Event) -> None:
    if isinstance(event, Committed):
        assert_type(event.durable_seconds, float)


def made(path: Path) -> list[Checkpointer]:
    return [
        Checkpointer(path),
        Checkpointer("run", every=100, keep=KeepLast(3)),
        Checkpointer(
            path,
            every=[Steps(100), Minutes(10)],
            keep=[KeepLast(3), KeepBest("loss", n=1, mode="min")],
            preemption=Preemption(deadline_seconds=30),
            on_event=[heard],
            config={"lr": 1e-3},
            files=Safetensors(codec=Planes(), delta=Delta(chain=2), shard_bytes=1 << 30, extent_bytes=4 << 20),
            staging=StagingOptions(budget_bytes=1 << 30, on_busy="skip", max_in_flight=1, stall_timeout_seconds=60),
            writer=WriterOptions(
                threads=2,
                direct=False,
                digest="sha256",
                reuse_unchanged=True,
                read_back=True,
                durable_timeout_seconds=600,
            ),
            ranks=RankOptions(timeout_seconds=60, check_replicas=True),
            run=RunOptions(
                name="step-{step}",
                create_parents=True,
                overwrite=True,
                takeover=True,
                lease=LeaseOptions(ttl_seconds=9),
            ),
        ),
        Checkpointer(path, files="zarr", ranks=None),
        Checkpointer(path, files=Zarr(codec="auto", chunk_bytes=1 << 20)),
        Checkpointer(path, files=Safetensors(per_rank=True)),
        Checkpointer(path, format="zarr"),  # type: ignore[call-arg]
        Checkpointer(path, files="pickle"),  # type: ignore[arg-type]
        Checkpointer(path, files=Zarr(delta=Delta())),  # type: ignore[call-arg]
        Checkpointer(path, staging=WriterOptions()),  # type: ignore[arg-type]
        Checkpointer(path, staging=StagingOptions(on_busy="hope")),  # type: ignore[arg-type]
    ]


def saved_and_restored(ckpt: Checkpointer, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = {"model": model, "optimizer": optimizer}
    ckpt.watch(optimizer)
    assert_type(ckpt.resume(state), int)
    assert_type(ckpt.step(1, state, {"loss": 0.1}), PendingSave | None)
    pending = ckpt.save(2, state, metrics={"loss": torch.tensor(0.1)}, weights_only=True)
    assert_type(pending.result(60), SaveReport)
    assert_type(ckpt.wait(1.0), bool)
    assert_type(ckpt.restore(state, 2, strict=False, include=["model."], rename={"a.": "b."}), RestoreReport)
    ckpt.restore(state, 2, strct=False)  # type: ignore[call-arg]
    ckpt.resume(state, strict=False)  # type: ignore[call-arg]
    assert_type(ckpt.prune(dry_run=True), list[CheckpointInfo])
    with ckpt as same, same.guard():
        assert_type(same, Checkpointer)


def looked_at(path: str) -> Sequence[Damage]:
    run = Run(path)
    assert_type(run.ls(), list[CheckpointInfo])
    assert_type(run.load_tensors(names=["model"]), dict[str, torch.Tensor])
    assert_type(run.pin(3), CheckpointInfo)
    assert_type(asyncckpt.__version__, str)
    return run.verify()
