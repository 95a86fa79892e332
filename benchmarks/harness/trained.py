"""Codecs are measured on states of a GPT that was really trained, as random tensors would say nothing about them."""

from __future__ import annotations

import os
from pathlib import Path

import asyncckpt
from asyncckpt.demo.data import collect
from asyncckpt.demo.training import Training, count_alike

#: The steps are early, mid and late in the run, and one ten steps after the last, for deltas.
STEPS = {"early": 200, "mid": 1000, "late": 2000, "later": 2010}
_SEED = 7


def trained_run(directory: Path) -> asyncckpt.Run:
    """Return a run directory that holds the checkpoints of ``STEPS``: model (10.7 M parameters, fp32) and AdamW's
    moments.

    It trains where they are not there yet, from where it was interrupted: about four minutes on one core.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "trained-gpt"
    run = asyncckpt.Run(path)
    if set(STEPS.values()) <= {entry.step for entry in run.ls() if entry.damage is None}:
        return run
    corpus = directory / "corpus.txt"
    collect(corpus)
    count_alike()
    last = max(STEPS.values())
    training = Training(corpus, seed=_SEED, total_steps=last)
    state = {**training.state, "steps": {"of": os.fspath(path)}}
    with asyncckpt.Checkpointer(path, every=asyncckpt.Milestones(sorted(STEPS.values()))) as ckpt:
        for step in range(ckpt.resume(state), last):
            loss, _ = training.step()
            ckpt.step(step + 1, state, metrics={"loss": loss})
    return run
