"""``Checkpointer(..., on_event=WandbSink(wandb.init(...)))`` sends events to Weights & Biases."""

from __future__ import annotations

import importlib
from typing import Any

from asyncckpt.errors import InvalidOption, MissingExtra
from asyncckpt.events import Event
from asyncckpt.integrations.scalars import scalars


class WandbSink:
    """Logs stall and durable time (seconds), bytes and failures as ``asyncckpt/…``.

    ``run`` is anything with ``log(values, step=…)``; the default is the run of this process (``wandb.run``). A save
    becomes durable after training has logged later steps, and W&B drops rows that go back. So a run that has
    ``define_metric``, as W&B's own do, gets the values without a step, added to the row that is open
    (``commit=False``), and ``asyncckpt/step`` as their x axis; other runs get ``step=`` the checkpoint's.

    Raises ``MissingExtra`` without ``run`` where wandb is not installed, and ``InvalidOption`` where no run is active.
    """

    def __init__(self, run: Any = None) -> None:
        self._run = _active_run() if run is None else run
        define = getattr(self._run, "define_metric", None)
        self._own_axis = callable(define)
        if callable(define):
            define("asyncckpt/*", step_metric="asyncckpt/step")

    def __call__(self, event: Event) -> None:
        values = scalars(event)
        if not values:
            return
        if self._own_axis:
            self._run.log({**values, "asyncckpt/step": event.step}, commit=False)
        else:
            self._run.log(values, step=event.step)


def _active_run() -> Any:
    try:
        module: Any = importlib.import_module("wandb")
    except ImportError as error:
        raise MissingExtra("WandbSink needs wandb: pip install 'asyncckpt[wandb]'") from error
    if module.run is None:
        raise InvalidOption("WandbSink: no W&B run is active; call wandb.init first, or pass the run")
    return module.run
