"""Planted bugs: assets that are not what was given, and names that mean another checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from asyncckpt import assets, saver
from asyncckpt.catalog import catalog, retention
from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.commit import transaction
from asyncckpt.commit.transaction import SaveTransaction
from asyncckpt.manifest import json as manifests
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.storage.local import LocalStore
from faults import mutant_checks as checks
from faults.mutant_checks import NAMED
from faults.mutants.registry import Patch, around, mutant


@mutant("an asset is read without a look at its digest", checks.assets_are_what_was_given)
def _(patch: Patch) -> None:
    def read(self: OpenCheckpoint) -> dict[str, bytes]:
        return {name: self.reader.read_small(name, 1 << 20) for name in self.manifest.assets}

    patch.setattr(OpenCheckpoint, "assets", read)


@mutant("assets are written, and not listed", checks.assets_are_what_was_given)
def _(patch: Patch) -> None:
    def publish(original: Any, self: Any, directory: Any, contents: Any, *args: Any) -> Any:
        *before, small, check, read_back = args
        listed = {name: data for name, data in small.items() if name not in contents.assets}
        contents = replace(contents, draft=replace(contents.draft, assets=()))
        return original(self, directory, contents, *before, listed, check, read_back)

    around(patch, SaveTransaction, "publish", publish)


@mutant("assets are written without an fsync", NAMED)
def _(patch: Patch) -> None:
    def write_small(original: Any, self: Any, directory: Any, contents: Any, **more: Any) -> Any:
        small = original(self, directory, replace(contents, assets={}), **more)
        for name, data in contents.assets.items():
            ops = directory._store.ops
            fd = ops.open(os.path.join(directory.path, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            ops.pwrite(fd, data, 0)
            ops.close(fd)
        return small | dict(contents.assets)

    around(patch, SaveTransaction, "write_small", write_small)


@mutant("assets are written once the checkpoint is visible", NAMED)
def _(patch: Patch) -> None:
    original_publish = transaction.publish

    def write_small(original: Any, self: Any, directory: Any, contents: Any, **more: Any) -> Any:
        return original(self, directory, replace(contents, assets={}), **more) | dict(contents.assets)

    def commit(original: Any, self: SaveTransaction, *args: Any) -> Any:
        def publish(directory: Any, draft: Any, **more: Any) -> Any:
            written = original_publish(directory, draft, **more)
            store: LocalStore = directory._store
            for name, data in self.contents.assets.items():
                store.put(f"{draft.name}/{name}", data)
            return written

        with patch.context() as inner:
            inner.setattr(transaction, "publish", publish)
            return original(self, *args)

    around(patch, SaveTransaction, "write_small", write_small)
    around(patch, SaveTransaction, "commit", commit)


@mutant("an asset may have the name of a file of ours", checks.assets_are_what_was_given)
def _(patch: Patch) -> None:
    patch.setattr(assets, "check_names", lambda names: None)


@mutant("a save's own asset does not take the place of the one for all", checks.assets_are_what_was_given)
def _(patch: Patch) -> None:
    def join(common: Mapping[str, bytes], own: Mapping[str, bytes], _limit: int) -> dict[str, bytes]:
        return {**own, **common}

    patch.setattr(saver, "join_assets", join)


@mutant("a name means the first checkpoint that had it", checks.a_name_means_what_was_saved_last, NAMED)
def _(patch: Patch) -> None:
    def of_name(name: str, entries: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
        return next((entry for entry in entries if name in entry.names), None)

    patch.setattr(catalog, "of_name", of_name)


@mutant("a name that moved falls back where its checkpoint is damaged", checks.a_name_means_what_was_saved_last)
def _(patch: Patch) -> None:
    def of_name(name: str, entries: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
        return next((e for e in reversed(entries) if name in e.names and e.damage is None), None)

    patch.setattr(catalog, "of_name", of_name)


@mutant("a name counts before its checkpoint is durable", NAMED)
def _(patch: Patch) -> None:
    """As a small file would that is written when the save begins."""

    def begin(original: Any, self: LocalStore, *args: Any, **more: Any) -> Any:
        directory = original(self, *args, **more)
        self.put("name-of-the-last", more["name"].encode(), replace=True)
        return directory

    def find(self: catalog.Catalog, name: str, _listing: Any) -> CheckpointInfo:
        info = self._store.listing("").get("name-of-the-last")
        if info is None:
            raise catalog.CheckpointNotFound("none")
        reader = self._store.open("")
        data = bytearray(100)
        count = reader.read_into("name-of-the-last", data, info.nbytes, 0)
        entry = self.inspect(bytes(data[:count]).decode())
        if entry is None:
            raise catalog.CheckpointDamaged(f"{name} leads nowhere")
        return entry

    around(patch, LocalStore, "begin", begin)
    patch.setattr(catalog.Catalog, "_find_name", find)


@mutant("retention takes what a name means", checks.a_name_means_what_was_saved_last)
def _(patch: Patch) -> None:
    patch.setattr(retention, "_named", lambda in_order: set())


@mutant("a save's names are not recorded", checks.a_name_means_what_was_saved_last)
def _(patch: Patch) -> None:
    original = manifests.encode

    def encode(manifest: Any, **more: Any) -> bytes:
        return original(replace(manifest, names=()), **more)

    patch.setattr(manifests, "encode", encode)
