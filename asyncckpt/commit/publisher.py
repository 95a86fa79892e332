"""Publishers turn a save whose data is on the disk into a checkpoint: by this process alone, or with other ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from asyncckpt.manifest.records import Manifest
from asyncckpt.protocols import PendingDirectory

if TYPE_CHECKING:
    from asyncckpt.commit.transaction import SaveTransaction


class Publisher(Protocol):
    """Publishes one save. Its methods are called on the committer's thread."""

    @property
    def keeps_files(self) -> bool:
        """Whether the files of a save that has failed here must stay, because another rank may still publish them."""

    def written_bytes(self, save: SaveTransaction, written: Manifest) -> int:
        """Return how many bytes of a durable checkpoint this process has written."""

    def prepare(self, save: SaveTransaction, directory: PendingDirectory) -> dict[str, bytes]:
        """Write those small files that can be written while the shards still are; return their contents by name."""

    def publish(
        self,
        save: SaveTransaction,
        directory: PendingDirectory,
        small: Mapping[str, bytes],
        check_lease: Callable[[], None],
        read_back: Callable[[PendingDirectory], None] | None,
    ) -> Manifest:
        """Publish the checkpoint, or wait until rank 0 has; return the manifest, which is durable. Blocks on the disk
        and, in a job, for the other ranks. ``small``: what ``prepare`` has written. Raises what keeps the checkpoint
        from being published."""

    def failed(self, save: SaveTransaction, error: BaseException) -> BaseException:
        """Tell whoever waits for this save that it has failed here. Returns the error to raise: another rank's where
        that came first. Idempotent; never raises."""


class Solo:
    """Publishes what this process alone has written."""

    keeps_files = False

    def written_bytes(self, save: SaveTransaction, written: Manifest) -> int:
        return written.nbytes - save.shards.written.linked_bytes()

    def prepare(self, save: SaveTransaction, directory: PendingDirectory) -> dict[str, bytes]:
        return save.write_small(directory, save.contents)

    def publish(
        self,
        save: SaveTransaction,
        directory: PendingDirectory,
        small: Mapping[str, bytes],
        check_lease: Callable[[], None],
        read_back: Callable[[PendingDirectory], None] | None,
    ) -> Manifest:
        records, orders = save.shards.written.records(), save.shards.written.orders()
        return save.publish(directory, save.contents, records, orders, small, check_lease, read_back)

    def failed(self, save: SaveTransaction, error: BaseException) -> BaseException:
        return error
