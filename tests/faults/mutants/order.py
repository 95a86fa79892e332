"""Planted bugs: the steps of a save, of retention and of a replacement come in another order."""

from __future__ import annotations

import os
from typing import Any

from asyncckpt.commit import transaction as commit
from asyncckpt.commit.committer import Committer
from asyncckpt.commit.pending import SaveReport
from asyncckpt.commit.transaction import SaveTransaction
from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.pending_dir import LocalPendingDirectory
from faults import mutant_checks as checks
from faults.mutant_checks import AGAIN, ONE, TWO
from faults.mutants.registry import Patch, around, deaf, mutant, remove_though_read


@mutant("the manifest is written before the other files", checks.order_is_the_documented_one)
def _(patch: Patch) -> None:
    late: dict[str, bytes] = {}

    class Later:
        def write_small(self, files: dict[str, bytes]) -> None:
            late.update(files)

    def write_small(original: Any, self: SaveTransaction, attempt: Any, *args: Any, **more: Any) -> Any:
        return original(self, Later(), *args, **more)

    def publish(original: Any, attempt: Any, draft: Any, *, before: Any, **more: Any) -> Any:
        def then() -> None:
            attempt.write_small(late)
            attempt.sync_directory()
            before()

        return original(attempt, draft, before=then, **more)

    around(patch, SaveTransaction, "write_small", write_small)
    around(patch, commit, "publish", publish)


@mutant("the rename comes before the manifest", ONE)
def _(patch: Patch) -> None:
    def publish(original: Any, attempt: Any, draft: Any, **more: Any) -> Any:
        attempt.sync_directory()
        attempt.publish(draft.name, replace=False)
        attempt.path = os.path.join(os.path.dirname(attempt.path), draft.name)
        attempt.publish = lambda *_, **__: None
        return original(attempt, draft, **more)

    around(patch, commit, "publish", publish)


@mutant("a save is acknowledged before it is published", ONE)
def _(patch: Patch) -> None:
    def do(original: Any, self: Committer, flight: Any) -> None:
        flight.pending.resolve(SaveReport(step=1, path="", nbytes=0, written_bytes=0, stall_seconds=0,
                                          staged_seconds=0, durable_seconds=0))  # fmt: skip
        original(self, flight)

    around(patch, Committer, "_commit", do)


@mutant("retention runs before the commit", TWO)
def _(patch: Patch) -> None:
    def publish(original: Any, self: LocalPendingDirectory, name: str, *, replace: bool) -> None:
        for old in self._store.names():
            remove_though_read(self._store, old)
        original(self, name, replace=replace)

    around(patch, LocalPendingDirectory, "publish", publish)


@mutant("a step that is saved again is deleted first", AGAIN)
def _(patch: Patch) -> None:
    def publish(original: Any, self: LocalPendingDirectory, name: str, *, replace: bool) -> None:
        if replace and self._store.identity(name) is not None:
            remove_though_read(self._store, name)
        original(self, name, replace=False)

    around(patch, LocalPendingDirectory, "publish", publish)


@mutant("a checkpoint is deleted where it is, not in the trash", TWO)
def _(patch: Patch) -> None:
    def remove(self: LocalStore, name: str) -> bool:
        self.delete_tree(os.path.join(self.path, name))
        return True

    patch.setattr(LocalStore, "remove", remove)


@mutant("files are deleted before the rename to the trash is durable", TWO)
def _(patch: Patch) -> None:
    def remove(original: Any, self: LocalStore, name: str) -> bool:
        with deaf(self, "fsync_directory"):
            done: bool = original(self, name)
        return done

    around(patch, LocalStore, "remove", remove)
