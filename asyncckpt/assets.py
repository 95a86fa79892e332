"""Assets are small files that belong to a checkpoint beside the state: configs, tokenizers, the program's settings.

They are read into memory when they are given, checked, and written with the checkpoint's other small files.
"""

from __future__ import annotations

import io
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

from asyncckpt.errors import InvalidOption
from asyncckpt.loaded_torch import loaded_torch
from asyncckpt.manifest.json import STATE_FILE
from asyncckpt.manifest.parse import is_file_name
from asyncckpt.manifest.parts import is_part_name
from asyncckpt.types import MANIFEST_FILE, MAX_EXTENT_BYTES


@runtime_checkable
class SavesPretrained(Protocol):
    """An object that writes itself into a directory as small files: a config, tokenizer, processor or scheduler."""

    def save_pretrained(self, save_directory: str, /) -> Any: ...


#: A path, the bytes of a file, or an object with ``save_pretrained``.
Asset: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | SavesPretrained"
#: Assets by name, or several that have names of their own.
Assets: TypeAlias = "Mapping[str, Asset] | Sequence[Asset]"

_OURS: Final = frozenset({MANIFEST_FILE, STATE_FILE, "zarr.json"})
#: What lies below this directory belongs to checkpoints that others build on.
_OUR_FOLDER: Final = "base"
#: A file of up to so many bytes that is plain text is no weights, whatever it is called: a notice to those who look for
#: weights of that name.
_NOTICE_BYTES: Final = 4096
_OUR_ENDINGS: Final = (".safetensors", ".index.json")
_ENDINGS_OF_WEIGHTS: Final = (
    *_OUR_ENDINGS,
    *(".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".pkl", ".pickle"),
)


def read_assets(given: Assets | None, limit_bytes: int) -> dict[str, bytes]:
    """Read assets into memory, and return their bytes by the name that each has in a checkpoint.

    Objects with ``save_pretrained`` write into a temporary directory, and are read from there. Blocks on the disk.
    Raises ``InvalidOption`` for a name that a checkpoint cannot have, for weights, for what cannot be read, and for
    more than ``limit_bytes`` in all.
    """
    found: dict[str, bytes] = {}
    for name, data in _read_all(given or {}, limit_bytes):
        if name in found:
            raise InvalidOption(f"asset {name!r}: two assets have this name; store one in a folder ('folder/…')")
        found[name] = data
        if sum(map(len, found.values())) > limit_bytes:
            raise _too_large(name, limit_bytes)
    check_names(found)
    return found


def join_assets(common: Mapping[str, bytes], own: Mapping[str, bytes], limit_bytes: int) -> dict[str, bytes]:
    """Return the assets of one save: those of all saves, with its own in the place of those of the same name. Raises
    ``InvalidOption`` as ``read_assets`` does."""
    joined = {**common, **own}
    if joined:
        check_names(joined)
        if sum(map(len, joined.values())) > limit_bytes:
            raise _too_large(next(iter(own)), limit_bytes)
    return joined


def check_names(assets: Mapping[str, bytes]) -> None:
    """Raise ``InvalidOption`` for names that files of one checkpoint cannot have beside those of the format."""
    seen: dict[str, str] = {}
    for name, data in assets.items():
        _check_name(name, data)
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise InvalidOption(f"assets {other!r} and {name!r} have names that differ only in case; rename one")
    for folded, name in seen.items():
        above = folded.rpartition("/")[0]
        while above:
            if above in seen:
                raise InvalidOption(f"asset {name!r} lies in a folder that is a file, {seen[above]!r}; rename one")
            above = above.rpartition("/")[0]


def check_places(names: Iterable[str], components: Iterable[str]) -> None:
    """Raise ``InvalidOption`` for an asset where a zarr checkpoint has the directory of a component."""
    taken = {component.casefold() for component in components}
    for name in names:
        first = name.partition("/")[0]
        if first.casefold().partition("+")[0] in taken:
            raise InvalidOption(
                f"asset {name!r}: in a zarr checkpoint, {first!r} is a component's directory; rename it"
            )


def _is_notice(data: bytes) -> bool:
    return 0 < len(data) <= _NOTICE_BYTES and data.isascii() and data.replace(b"\n", b" ").decode("ascii").isprintable()


def _check_name(name: str, data: bytes) -> None:
    if not is_file_name(name):
        raise InvalidOption(
            f"asset {name!r:.200} is no name for a file of a checkpoint: give a relative one, of at most two folders "
            f"and a file, of letters, digits and ._=+-, each part beginning with a letter or digit"
        )
    folded = name.casefold()
    if folded.endswith(_OUR_ENDINGS) or (folded.endswith(_ENDINGS_OF_WEIGHTS) and not _is_notice(data)):
        raise InvalidOption(
            f"asset {name!r} is named as weights are, which are no assets: they are saved in the background as a part "
            f"of the state. Put the module or tensors into the state; a file that is something else wants another name"
        )
    if folded.rpartition("/")[2] in _OURS or is_part_name(folded) or folded.partition("/")[0] == _OUR_FOLDER:
        raise InvalidOption(f"asset {name!r} has a name that checkpoints use themselves; choose another, or a folder")


def _read_all(given: Assets, limit_bytes: int) -> Iterator[tuple[str, bytes]]:
    if isinstance(given, Mapping):
        for key, value in given.items():
            if not isinstance(key, str) or not key:
                raise InvalidOption(f"assets: {key!r:.80} is no name; names are text, as in {{'config': model.config}}")
            yield from _read(key, value, limit_bytes, named=True)
    elif isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray | memoryview):
        for number, value in enumerate(given):
            yield from _read(f"[{number}]", value, limit_bytes, named=False)
    else:
        raise InvalidOption(
            f"assets must be a dict of names or a list, such as [model.config, tokenizer, 'train.yaml'], not "
            f"{type(given).__name__}"
        )


def _read(key: str, value: Asset, limit_bytes: int, *, named: bool) -> Iterator[tuple[str, bytes]]:
    folder = key if named and key.endswith("/") else ""
    kind = type(value).__name__
    if _has_weights(value):
        raise InvalidOption(
            f"asset {key!r}: {kind} has weights, which are no assets. Put the module into the state, where it is saved "
            f"in the background, and give what belongs to it: assets=[model.config, tokenizer]"
        )
    if isinstance(value, bytes | bytearray | memoryview):
        if not named or folder:
            raise InvalidOption(f"asset {key!r}: bytes need a name, as in {{'notes.txt': b'…'}}")
        if memoryview(value).nbytes > limit_bytes:
            raise _too_large(key, limit_bytes)
        yield key, bytes(value)
    elif isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        name = key if named and not folder else folder + os.path.basename(path)
        yield name, _read_file(name, path, limit_bytes)
    elif isinstance(value, SavesPretrained) and not isinstance(value, type):
        for name, data in _pretrained(key, value, limit_bytes):
            yield folder + name, data
    else:
        raise InvalidOption(
            f"asset {key!r} is of type {kind}: give a path, bytes, or an object with save_pretrained, such as a config "
            f"or a tokenizer"
        )


def _pretrained(key: str, value: SavesPretrained, limit_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Yield the files that ``save_pretrained`` makes, by their names below the directory that it is given."""
    kind = type(value).__name__
    with tempfile.TemporaryDirectory(prefix="asyncckpt-assets-") as folder:
        try:
            value.save_pretrained(folder)
        except Exception as error:
            raise InvalidOption(f"asset {key!r}: {kind}.save_pretrained failed: {error}") from error
        count = 0
        for where, folders, files in os.walk(folder):
            folders.sort()
            for file in sorted(files):
                path = os.path.join(where, file)
                name = os.path.relpath(path, folder).replace(os.sep, "/")
                if name.casefold().endswith(_ENDINGS_OF_WEIGHTS):
                    raise InvalidOption(
                        f"asset {key!r}: {kind}.save_pretrained wrote {name}: that is weights, which are no assets. "
                        f"Put the tensors into the state, and give the object's config instead"
                    )
                yield name, _read_file(name, path, limit_bytes)
                count += 1
        if not count:
            raise InvalidOption(f"asset {key!r}: {kind}.save_pretrained wrote no file; give the files themselves")


def _has_weights(value: object) -> bool:
    """Return whether an object is a module, or a pipeline of some: to write that would take very long."""
    torch = loaded_torch()
    if torch is None:
        return False
    parts = getattr(value, "components", None)
    return isinstance(value, torch.nn.Module) or (
        isinstance(parts, Mapping) and any(isinstance(part, torch.nn.Module) for part in parts.values())
    )


def _read_file(name: str, path: str, limit_bytes: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for
        try:
            regular = stat.S_ISREG(os.fstat(fd).st_mode)
            with os.fdopen(fd, "rb", closefd=False) if regular else io.BytesIO() as file:
                data = file.read(limit_bytes + 1)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        raise InvalidOption(
            f"asset {name!r}: {path!r:.200} cannot be read ({error}). A str is a path: give text as bytes, "
            f"text.encode()"
        ) from error
    if not regular:
        raise InvalidOption(f"asset {name!r}: {path} is a directory or a device; give files")
    if len(data) > limit_bytes:
        raise _too_large(name, limit_bytes)
    return data


def _too_large(name: str, limit_bytes: int) -> InvalidOption:
    return InvalidOption(
        f"asset {name!r}: the assets of a checkpoint have more than {limit_bytes} bytes. What is large belongs into "
        f"the state, as a tensor; or pass writer=WriterOptions(asset_bytes=…), up to {MAX_EXTENT_BYTES}"
    )
