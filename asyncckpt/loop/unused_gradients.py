"""Notices a save between backward and the optimizer's step: gradients are not saved, and what they hold is lost."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Iterable

import torch

log = logging.getLogger("asyncckpt")

#: The attribute of a gradient that a step has used.
_USED = "_asyncckpt_used"
#: So many parameters are looked at for one that has a gradient.
_LOOKS = 8


class UnusedGradients:
    """Looks at one gradient of each optimizer. A look takes microseconds, and never waits for a device: it compares no
    values. A gradient is marked once a step has used it; a save that finds one without the mark came after backward and
    before the step. Where a gradient is zeroed in place it stays marked, and nothing is said. For the training thread.
    """

    def __init__(self) -> None:
        #: A parameter that had a gradient at its optimizer's latest step, by the optimizer's identity.
        self._looked_at: dict[int, weakref.ref[torch.Tensor]] = {}
        self._told = False

    def used(self, optimizer: torch.optim.Optimizer) -> None:
        """Note that the optimizer has stepped."""
        if self._told or torch.compiler.is_compiling():
            return
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        for parameter in itertools.islice(parameters, _LOOKS):
            gradient = parameter.grad
            if gradient is not None:
                setattr(gradient, _USED, True)
                self._looked_at[id(optimizer)] = weakref.ref(parameter)
                return

    def tell(self, step: int, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Log, once, that one of these optimizers has gradients that no step has used."""
        if self._told:
            return
        for optimizer in optimizers:
            reference = self._looked_at.get(id(optimizer))
            parameter = reference() if reference is not None else None
            gradient = parameter.grad if parameter is not None else None
            if gradient is not None and not hasattr(gradient, _USED):
                self._told = True
                log.warning(
                    "step %d is saved after backward and before the step of %s: gradients are not saved, so a run that "
                    "resumes here has lost what they have accumulated. Save right after optimizer.step(). (Ignore this "
                    "where another loss left them, and zero_grad comes next.)",
                    step,
                    type(optimizer).__name__,
                )
                return
