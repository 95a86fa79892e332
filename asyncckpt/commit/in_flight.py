"""A save that is neither durable nor failed yet, and what belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from asyncckpt.commit.pending import PendingSave
from asyncckpt.commit.transaction import Save
from asyncckpt.stage.job import StagingJob


@dataclass(frozen=True, slots=True)
class InFlight:
    """A save and everything that belongs to it. ``deferred``: the tensors that are copied while training goes
    on."""

    save: Save
    job: StagingJob
    pending: PendingSave
    deferred: Sequence[torch.Tensor] = ()
