"""``Checkpointer(..., on_event=TensorBoardSink(writer))`` sends events to TensorBoard."""

from __future__ import annotations

import os
from typing import Any, Protocol

from asyncckpt.errors import MissingExtra
from asyncckpt.events import Event
from asyncckpt.integrations.scalars import scalars


class ScalarWriter(Protocol):
    """The sink uses this part of ``torch.utils.tensorboard.SummaryWriter`` (or tensorboardX's), which is
    thread-safe."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


class TensorBoardSink:
    """Writes stall and durable time (seconds), bytes and failures as scalars ``asyncckpt/…``, at the checkpoint's step.

    ``writer`` is a ``SummaryWriter``, which stays yours to flush and close, or a log directory: then the sink makes a
    writer, and ``close`` closes it. Raises ``MissingExtra`` for a directory where tensorboard is not installed.
    Thread-safe.
    """

    def __init__(self, writer: ScalarWriter | str | os.PathLike[str]) -> None:
        self._owned: Any = _summary_writer(os.fspath(writer)) if isinstance(writer, str | os.PathLike) else None
        self._writer: Any = writer if self._owned is None else self._owned

    def __call__(self, event: Event) -> None:
        for tag, value in scalars(event).items():
            self._writer.add_scalar(tag, value, event.step)

    def close(self) -> None:
        """Close the writer that the sink made; one that was handed in stays open. Idempotent."""
        if self._owned is not None:
            self._owned.close()


def _summary_writer(path: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("TensorBoardSink needs tensorboard: pip install 'asyncckpt[tensorboard]'") from error
    make: Any = SummaryWriter
    return make(path)
