"""Is this checkpoint good? Every byte of every file against the manifest; a list of damage, empty when good."""

from __future__ import annotations

from collections.abc import Callable

from asyncckpt import manifest as manifests
from asyncckpt import plain
from asyncckpt.errors import CheckpointDamaged
from asyncckpt.formats.safetensors import MAX_HEADER_BYTES, header_length, parse_header
from asyncckpt.manifest import FILE_NAME, STATE_FILE, ExtentRecord, FileRecord, Manifest
from asyncckpt.protocols import Reader
from asyncckpt.reading import Damage, aligned_buffer, check_files, read_extents, read_small_file

#: Plain values are small; a larger file is not one this library wrote.
MAX_STATE_BYTES = 1 << 30

Progress = Callable[[int, int], None]


def verify(reader: Reader, *, progress: Progress | None = None) -> list[Damage]:
    """Read every byte past the page cache and check it; empty means good.

    ``progress(done_bytes, total_bytes)`` is called from reader threads. Safe on a hostile directory: nothing is
    executed, links are not followed, and memory stays within the largest extent times the reader threads. Raises
    only ``CheckpointNotFound`` and ``VersionUnsupported``.
    """
    try:
        manifest = manifests.load(reader)
        damage = check_files(reader, manifest)
    except CheckpointDamaged as error:
        return [Damage(FILE_NAME, 0, 0, str(error))]
    broken = {entry.file for entry in damage}
    total = sum(record.nbytes for record in manifest.files)
    done = 0

    def consume(_file: FileRecord, extent: ExtentRecord, _view: memoryview) -> None:
        nonlocal done
        done += extent.nbytes
        if progress is not None:
            progress(min(done, total), total)

    wanted = [(r, extent) for r in manifest.files if r.name not in broken for extent in r.extents]
    damage += read_extents(reader, manifest.digest, wanted, consume, stop_at_damage=False)
    if not damage:
        damage += _views(reader, manifest)
    return sorted(damage, key=lambda entry: (entry.file, entry.offset))


def _views(reader: Reader, manifest: Manifest) -> list[Damage]:
    """What other tools read (headers, ``state.json``) says the same as the manifest."""
    damage: list[Damage] = []
    stored = {
        (record.file, name): (record.dtype, record.shape, record.begin, record.end)
        for component in manifest.components.values()
        for name, record in component.tensors.items()
    }
    for record in manifest.files:
        try:
            if record.name == STATE_FILE:
                plain.loads(read_small_file(reader, manifest, STATE_FILE, MAX_STATE_BYTES), STATE_FILE)
            elif record.name.endswith(".safetensors"):
                seen = {
                    (record.name, p.spec.name): (p.spec.dtype, p.spec.shape, p.begin, p.end)
                    for p in parse_header(_head(reader, record), record.nbytes, record.name)
                }
                if seen != {key: value for key, value in stored.items() if key[0] == record.name}:
                    damage.append(Damage(record.name, 0, 0, "its header lists other tensors than the manifest"))
        except ValueError as error:
            damage.append(Damage(record.name, 0, record.nbytes, str(error)))
    return damage


def _head(reader: Reader, record: FileRecord) -> bytes:
    first = aligned_buffer(4096)
    reader.read_into(record.name, first, min(4096, record.nbytes), 0)
    length = min(8 + header_length(bytes(first[:8]), record.nbytes, record.name), 8 + MAX_HEADER_BYTES)
    head = aligned_buffer(length)
    reader.read_into(record.name, head, length, 0)
    return bytes(head[:length])
