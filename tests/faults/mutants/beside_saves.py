"""Planted bugs beside the saves: who learns how they ended, forked children, what is taken for unchanged."""

from __future__ import annotations

import asyncio
import os
import types
from typing import Any

from asyncckpt.checkpointer import Checkpointer
from asyncckpt.commit import transaction as commit
from asyncckpt.commit.pending import PendingSave
from asyncckpt.loop import at_exit as leaving
from asyncckpt.loop import preemption
from asyncckpt.storage import lease
from faults import beside_saves
from faults.mutants.registry import Patch, around, mutant


def _everywhere_at_home(patch: Patch, module: Any) -> None:
    """For this module, a forked child is the process that it was forked from."""
    found = {name: getattr(os, name) for name in dir(os)} | {"getpid": lambda: 1}
    patch.setattr(module, "os", types.SimpleNamespace(**found))


@mutant("whoever begins to await has seen the error", beside_saves.who_awaited_in_vain_is_told)
def _(patch: Patch) -> None:
    def awaited(self: PendingSave) -> Any:
        self._observed = True
        return asyncio.wrap_future(self._future).__await__()

    patch.setattr(PendingSave, "__await__", awaited)


@mutant("whoever begins to wait has seen the error", beside_saves.who_waited_in_vain_is_told)
def _(patch: Patch) -> None:
    def deliver(original: Any, self: PendingSave, timeout: float | None) -> None:
        self._observed = True
        original(self, timeout)

    around(patch, PendingSave, "_deliver", deliver)


@mutant("the drain runs in a forked child", beside_saves.a_forked_child_ends_at_once)
def _(patch: Patch) -> None:
    def close(original: Any, self: Checkpointer) -> None:
        self._pid = os.getpid()
        original(self)

    _everywhere_at_home(patch, leaving)
    around(patch, Checkpointer, "close", close)


@mutant("a forked child waits for a save of its parent's", beside_saves.a_forked_child_does_not_wait_for_a_save)
def _(patch: Patch) -> None:
    patch.setattr(PendingSave, "disarm", lambda self: None)


@mutant("a forked child takes a note of signals, like its parent", beside_saves.a_forked_child_ends_on_sigterm)
def _(patch: Patch) -> None:
    _everywhere_at_home(patch, preemption)
    patch.setattr(preemption.SignalWatch, "disarm", lambda self: None)


@mutant("a forked child keeps the directory's lock", beside_saves.a_forked_child_has_no_lock)
def _(patch: Patch) -> None:
    patch.setattr(lease._LockFile, "disarm", lambda self: None)


@mutant("crc32c alone decides a link", beside_saves.a_change_that_crc32c_does_not_show_is_saved)
def _(patch: Patch) -> None:
    patch.setattr(commit, "second_digest", lambda name: None)
