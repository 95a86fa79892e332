"""How a save whose data is on the disk becomes a checkpoint: by this process alone, or with the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from asyncckpt.manifest.records import Manifest
from asyncckpt.protocols import Attempt
from asyncckpt.types import Layout

if TYPE_CHECKING:
    from asyncckpt.commit.transaction import SaveTransaction


class Publisher(Protocol):
    """One object a save; its methods are called on the committer's thread."""

    @property
    def keeps_files(self) -> bool:
        """Whether the files of a save that has failed here must stay, because another rank may still publish them."""

    def least_bytes(self, layout: Layout) -> int:
        """Room that the save needs on the storage, whatever is taken over from the checkpoint before."""

    def written_bytes(self, save: SaveTransaction, written: Manifest) -> int:
        """What this process has written of a durable checkpoint."""

    def prepare(self, save: SaveTransaction, attempt: Attempt) -> dict[str, bytes]:
        """Write those small files that can be written while the shards still are; what is in them, by name."""

    def publish(
        self,
        save: SaveTransaction,
        attempt: Attempt,
        small: Mapping[str, bytes],
        check_lease: Callable[[], None],
        read_back: Callable[[str], None] | None,
    ) -> Manifest:
        """Publish the checkpoint, or see it published; what is durable then. Blocks, in a job for the other ranks.
        ``small``: what ``prepare`` has written. Raises what keeps it from being published."""

    def failed(self, save: SaveTransaction, error: BaseException) -> BaseException:
        """The save has failed here: let whoever waits for it know. The error to raise: that of another rank where it
        came first. Idempotent; never raises."""


class Solo:
    """This process publishes what it alone has written."""

    keeps_files = False

    def least_bytes(self, layout: Layout) -> int:
        return 0

    def written_bytes(self, save: SaveTransaction, written: Manifest) -> int:
        return written.nbytes - save.shards.linked_bytes()

    def prepare(self, save: SaveTransaction, attempt: Attempt) -> dict[str, bytes]:
        return save.write_small(attempt, save.contents)

    def publish(
        self,
        save: SaveTransaction,
        attempt: Attempt,
        small: Mapping[str, bytes],
        check_lease: Callable[[], None],
        read_back: Callable[[str], None] | None,
    ) -> Manifest:
        records, orders = save.shards.records(), save.shards.orders()
        return save.publish(attempt, save.contents, records, orders, small, check_lease, read_back)

    def failed(self, save: SaveTransaction, error: BaseException) -> BaseException:
        return error
