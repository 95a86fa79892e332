"""A zip archive that ``torch.save`` wrote is looked into: whether it is one, its pickle, and where its storages lie.

``zipfile`` lists the entries; their bytes are read by whoever has the file, since entries may be written without a
checksum, which ``zipfile`` would refuse, and storages are mapped rather than read.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from asyncckpt.errors import CheckpointDamaged

#: Reads so many bytes from an offset of the file on; fewer where the file ends.
ReadAt = Callable[[int, int], bytes]

_LOCAL_HEAD_BYTES: Final = 30


class TorchArchive:
    """The entries of an archive, by their names below its folder. ``file``: the archive as a file; ``size``: its bytes;
    ``where``: what errors call it. Blocks on the disk. Raises ``CheckpointDamaged`` for what ``torch.save`` did not
    write, and for a pickle of more than ``most_pickle_bytes``."""

    def __init__(self, file: Any, read_at: ReadAt, size: int, where: str, most_pickle_bytes: int) -> None:
        self._read_at = read_at
        self._size = size
        self._where = where
        try:
            with zipfile.ZipFile(file) as archive:
                found = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
            raise CheckpointDamaged(f"{where}: no archive of torch.save ({error!s:.200})") from error
        self.entries: Mapping[str, zipfile.ZipInfo] = found
        if "data.pkl" not in found or found["data.pkl"].file_size > most_pickle_bytes:
            raise CheckpointDamaged(f"{where}: an archive without a pickle of a sensible size, so none of torch.save")
        if any(info.compress_type != zipfile.ZIP_STORED for info in found.values()):
            raise CheckpointDamaged(f"{where}: a compressed archive, which torch.save does not make")
        if "constants.pkl" in found:
            raise CheckpointDamaged(
                f"{where}: a TorchScript program, not a file of torch.save; save its state_dict() with torch.save"
            )
        if "byteorder" in found and self._bytes_of("byteorder", 16) != b"little":
            raise CheckpointDamaged(f"{where}: written on a machine of another byte order")
        self.pickle = self._bytes_of("data.pkl", most_pickle_bytes)

    def place(self, name: str) -> tuple[int, int]:
        """Return where the data of an entry begins in the file, and its size. Raises ``CheckpointDamaged``."""
        info = self.entries[name]
        head = self._read_at(info.header_offset, _LOCAL_HEAD_BYTES)
        if len(head) < _LOCAL_HEAD_BYTES or head[:4] != b"PK\3\4":
            raise CheckpointDamaged(f"{self._where}: {info.filename!r:.80} is not where the archive's list says")
        names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        begin = info.header_offset + _LOCAL_HEAD_BYTES + names
        if begin + info.file_size > self._size:
            raise CheckpointDamaged(f"{self._where}: {info.filename!r:.80} is cut off")
        return begin, info.file_size

    def storage(self, key: str) -> tuple[int, int]:
        """Return where a storage begins in the file, and its size. Raises ``CheckpointDamaged``."""
        if f"data/{key}" not in self.entries:
            raise CheckpointDamaged(f"{self._where}: storage {key!r:.40} is missing")
        return self.place(f"data/{key}")

    def _bytes_of(self, name: str, most: int) -> bytes:
        begin, nbytes = self.place(name)
        found = self._read_at(begin, min(nbytes, most))
        expected = self.entries[name].CRC  # 0 where torch was told to write none
        if expected and zlib.crc32(found) != expected:
            raise CheckpointDamaged(f"{self._where}: {name} does not match its checksum; copy the file again")
        return found


def is_place(offset: Any, size: Sequence[Any], stride: Sequence[Any]) -> bool:
    """Whether these can be where a tensor lies in a storage: whole numbers that are not too large for that."""
    return len(size) == len(stride) and all(
        type(number) is int and 0 <= number < 1 << 62 for number in (offset, *size, *stride)
    )


def end_of(offset: int, size: Sequence[int], stride: Sequence[int]) -> int:
    """Return the element after the last that a tensor with elements has in its storage."""
    return offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True)) + 1
