"""What a save has made of its shards is listed here for the manifest, once all of them are durable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from asyncckpt.manifest.records import FileRecord
from asyncckpt.write.progress import ShardProgress
from asyncckpt.write.unchanged import Unchanged


class WrittenFiles:
    """Lists the files of one save. Ask once nothing is unfinished. Never blocks."""

    def __init__(self, shards: Sequence[ShardProgress], unchanged: Unchanged) -> None:
        self._shards = shards
        self._unchanged = unchanged

    def records(self) -> list[FileRecord]:
        """List the files as written, those they build on included."""
        return [progress.record() for progress in self._shards if progress.shard.extents] + self._built_on()

    def orders(self) -> Mapping[str, list[int]]:
        """List, for each file, the position of each of the layout's extents among those of its record."""
        found: dict[str, list[int]] = {}
        for progress in self._shards:
            index = {extent.offset: at for at, extent in enumerate(progress.extents())}
            found[progress.shard.file] = [index[extent.offset] for extent in progress.ordered()]
        return found

    def linked_bytes(self) -> int:
        """Count the bytes of the checkpoint that were taken over without writing them."""
        whole = sum(progress.nbytes for progress in self._shards if progress.linked)
        return whole + sum(layer.nbytes for layer in self._built_on())

    def _built_on(self) -> list[FileRecord]:
        return [layer for progress in self._shards for layer in progress.layers or ()] + self._unchanged.unused
