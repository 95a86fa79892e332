"""The demo trains on the standard library's sources, with a loader that can stop in the middle of an epoch."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asyncckpt.errors import InvalidOption

#: The top level of the standard library has about 4 MB; more would only take longer to read.
_MAX_BYTES = 4 << 20


def collect(path: Path) -> int:
    """Write this Python's own ``.py`` sources into one file, and return its size in bytes."""
    text = bytearray()
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += source.read_bytes()
    del text[_MAX_BYTES:]
    path.write_bytes(text)
    return len(text)


class TextLoader:
    """Gives endless batches ``(inputs, targets)``, int64 ``[batch, context]``, of byte windows in an order that is
    shuffled anew in each epoch. ``state_dict`` says where it stands, so a resumed run takes up the very next batch."""

    def __init__(self, path: Path, *, batch: int, context: int, seed: int) -> None:
        text = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        windows = (len(text) - 1) // context
        if windows < batch:
            raise InvalidOption(f"{path} has {len(text)} bytes, too few for one batch of {batch} x {context}")
        self._text = torch.from_numpy(text.astype(np.int64))
        self._batch = batch
        self._context = context
        self._windows = windows
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._shuffle()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            if self.position + self._batch > self._windows:
                self.epoch, self.position = self.epoch + 1, 0
                self._shuffle()
            chosen = self._order[self.position : self.position + self._batch]
            self.position += self._batch
            at = chosen[:, None] * self._context + torch.arange(self._context)
            yield self._text[at], self._text[at + 1]

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._shuffle()

    def _shuffle(self) -> None:
        # each epoch has a generator of its own, so that the order needs no state beyond these two numbers
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self._order = torch.randperm(self._windows, generator=generator)
