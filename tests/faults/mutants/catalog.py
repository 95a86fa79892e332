"""Planted bugs: checkpoints are deleted, replaced or passed over that must not be."""

from __future__ import annotations

import os
import re
import types
from dataclasses import replace
from typing import Any

from asyncckpt import restoring
from asyncckpt.catalog import catalog, retention
from asyncckpt.commit import pruner
from asyncckpt.errors import CheckpointNotFound, NoUsableCheckpoint
from asyncckpt.storage import lease, local
from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.posix import PosixOps
from faults import mutant_checks as checks
from faults.mutant_checks import BACK, BACK_KILLED, TWO
from faults.mutants.registry import Patch, around, mutant, remove_though_read

# -- retention, recovery, other processes ------------------------------------------------------------------------------


@mutant("retention takes the newest", TWO, checks.retention_keeps_what_it_must)
def _(patch: Patch) -> None:
    patch.setattr(pruner, "plan", lambda entries, policies: [e for e in entries if not e.pinned][-1:])


@mutant("retention takes pinned checkpoints", checks.retention_keeps_what_it_must)
def _(patch: Patch) -> None:
    def plan(entries: Any, policies: Any) -> Any:
        bare = [replace(entry, pinned=False) for entry in entries]
        return retention.plan(bare, policies)

    patch.setattr(pruner, "plan", plan)


@mutant("retention takes a checkpoint that is being read", checks.retention_keeps_what_it_must)
def _(patch: Patch) -> None:
    patch.setattr(local, "_try_exclusive", lambda path: -1)


@mutant("a run falls back to the start without a word", checks.a_run_without_a_usable_checkpoint_does_not_start_anew)
def _(patch: Patch) -> None:
    def newest(original: Any, self: restoring.RestoresState, *args: Any) -> Any:
        try:
            return original(self, *args)
        except NoUsableCheckpoint as error:
            raise CheckpointNotFound(str(error)) from None

    around(patch, restoring.RestoresState, "_restore_newest", newest)


@mutant("a damaged newest checkpoint is passed over in silence", checks.a_damaged_newest_is_passed_over_loudly)
def _(patch: Patch) -> None:
    patch.setattr(restoring, "warnings", types.SimpleNamespace(warn=lambda *_, **__: None))


@mutant("an attempt's directory is used again", checks.nothing_is_ever_overwritten)
def _(patch: Patch) -> None:
    around(patch, PosixOps, "mkdir", lambda original, self, path: os.makedirs(path, exist_ok=True))


@mutant("the rename replaces what is there", checks.nothing_is_ever_overwritten)
def _(patch: Patch) -> None:
    patch.setattr(PosixOps, "rename_noreplace", lambda self, source, target: os.rename(source, target))


@mutant("attempts of a live run are reclaimed", checks.a_live_run_keeps_its_attempts)
def _(patch: Patch) -> None:
    unlocked = types.SimpleNamespace(LOCK_EX=0, LOCK_NB=0, LOCK_UN=0, flock=lambda *_: None)
    patch.setattr(lease, "fcntl", unlocked)


@mutant("the lease is not checked before the publish", checks.a_run_that_was_cut_off_publishes_nothing)
def _(patch: Patch) -> None:
    patch.setattr(lease.HeldLease, "check", lambda self: None)


# -- going back --------------------------------------------------------------------------------------------------------


@mutant("a step that is saved again after going back is deleted first", BACK)
def _(patch: Patch) -> None:
    def make_way(self: LocalStore, name: str, attempt: str) -> None:
        remove_though_read(self, name)

    patch.setattr(LocalStore, "make_way", make_way)


@mutant("what had made way when a run was killed is deleted unseen", BACK, BACK_KILLED)
def _(patch: Patch) -> None:
    def settle(self: catalog.Catalog) -> None:
        for one in self._store.replaced():
            self._store.remove(one.hidden)

    patch.setattr(catalog.Catalog, "settle_replaced", settle)


@mutant("what had made way gets its name back though its successor is there", BACK)
def _(patch: Patch) -> None:
    def settle(self: catalog.Catalog) -> None:
        for one in self._store.replaced():
            if self._store.identity(one.name) is not None:
                remove_though_read(self._store, one.name)  # type: ignore[arg-type]
            self._store.put_back(one)

    patch.setattr(catalog.Catalog, "settle_replaced", settle)


@mutant("a save that failed does not give its step back to what made way", checks.a_failed_save_replaces_nothing)
def _(patch: Patch) -> None:
    patch.setattr(LocalStore, "put_back", lambda self, replaced: True)


@mutant("the largest step is taken for the newest", checks.what_was_saved_last_is_the_newest, BACK)
def _(patch: Patch) -> None:
    patch.setattr(catalog, "age", lambda entry: (0, entry.step))


@mutant("retention keeps the largest steps", checks.what_was_saved_last_is_the_newest)
def _(patch: Patch) -> None:
    patch.setattr(retention, "age", lambda candidate: (0, candidate.step))


@mutant("retention takes copies that somebody made", checks.what_others_made_stays)
def _(patch: Patch) -> None:
    def entries(original: Any, self: catalog.Catalog, **options: Any) -> Any:
        return [replace(entry, renamed=False) for entry in original(self, **options)]

    around(patch, catalog.Catalog, "entries", entries)


@mutant("whatever begins with .tmp- is deleted", checks.what_others_made_stays)
def _(patch: Patch) -> None:
    patch.setattr(local, "_LEFTOVER", re.compile(r"\.(tmp|trash)-.*"))
