"""Files beside a run are one process's to write, also where all ranks of a job save together. What it finds or does is
told to the others, and what hinders it hinders all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from asyncckpt.ranks.store import RankOptions, error_from_json, error_to_json

_T = TypeVar("_T")


class Savers(Protocol):
    """Stands for the processes that save together. All of them make the same calls, on their training threads."""

    @property
    def options(self) -> RankOptions | None:
        """What ``Checkpointer`` is told of them."""

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which writes the files beside the run."""

    def by_first(self, act: Callable[[], _T]) -> _T:
        """Have the first process call ``act``; return on all what it has returned, or raise what it has raised."""

    def all(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on all of them."""

    def check(self, error: Exception | None) -> None:
        """Raise ``error`` where there is one, and where there is none that of the first process that has one."""


class Alone:
    """The process saves alone."""

    options: RankOptions | None = None
    leads = True

    def by_first(self, act: Callable[[], _T]) -> _T:
        return act()

    def all(self, flag: bool) -> bool:
        return flag

    def check(self, error: Exception | None) -> None:
        if error is not None:
            raise error


class RanksOf:
    """All ranks of a job save together. ``strategy``: the one that Lightning trains with, whose ``broadcast`` is used.
    Whatever the first rank returns is sent by ``pickle``, as Lightning sends everything."""

    def __init__(self, strategy: Any, options: RankOptions) -> None:
        self._strategy = strategy
        self.options = options

    @property
    def leads(self) -> bool:
        return bool(self._strategy.global_rank == 0)

    def by_first(self, act: Callable[[], _T]) -> _T:
        answer: Any = None
        own: Exception | None = None
        if self.leads:
            try:
                answer = {"value": act()}
            except Exception as error:
                answer, own = {"error": error_to_json(error)}, error
        answer = self._strategy.broadcast(answer)
        if own is not None:
            raise own
        if "error" in answer:
            raise error_from_json(answer["error"], "rank 0")
        value: _T = answer["value"]
        return value

    def all(self, flag: bool) -> bool:
        return bool(self._strategy.reduce_boolean_decision(flag, all=True))

    def check(self, error: Exception | None) -> None:
        if self.all(error is None):
            return
        told: list[Any] = [None] * self._strategy.world_size
        torch.distributed.all_gather_object(told, None if error is None else error_to_json(error))
        if error is not None:
            raise error
        rank, body = next((rank, body) for rank, body in enumerate(told) if body is not None)
        raise error_from_json(body, f"rank {rank}")
