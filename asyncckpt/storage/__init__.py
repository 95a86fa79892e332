"""Storage backends: bytes in, bytes out, durability. Nothing here knows what a tensor is.

An address says which backend a run lives in: a path, or ``scheme:`` and what that backend makes of the rest.
"""

from __future__ import annotations

import importlib
import os
import re
from typing import Final

from asyncckpt.errors import InvalidOption
from asyncckpt.protocols import Store

#: The backends: scheme → the module and the function ``open_at(address, direct)`` in it. One row is one backend; its
#: module, and what that needs, is imported when a run of it is opened.
_BACKENDS: Final = {
    "file": "asyncckpt.storage.local",
    "memory": "asyncckpt.storage.memory",
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
#: A bucket's address that was a ``pathlib.Path``, or went through ``os.path.normpath``: both keep one slash of two.
_BUCKET_AS_PATH = re.compile(
    r"(s3[an]?|gs|gcs|gdrive|az|azure|abfss?|adl|wasbs?|hdfs|webhdfs|viewfs|hf|r2|oss|obs|cos|swift|b2|lakefs|dbfs|"
    r"https?|s?ftp|ssh|memory|file):/(?!/)",
    re.IGNORECASE,
)


def scheme_of(address: str | os.PathLike[str]) -> str:
    """Return the scheme of an address; ``file`` for a path. Raises ``InvalidOption`` for what is neither."""
    if not isinstance(address, str | os.PathLike):
        raise InvalidOption(f"path must be text or a Path, such as 'gpt-run', not {address!r:.80}")
    match = _SCHEME.match(os.fspath(address))
    if match is None:
        match = _BUCKET_AS_PATH.match(os.fspath(address))
    return match[1].lower() if match else "file"


def local_path(address: str | os.PathLike[str]) -> str:
    """Return the absolute path of something that has to lie in a local file system. Touches no storage. Raises
    ``InvalidOption`` for an address of any other storage, which would become a directory of that name."""
    text, scheme = os.fspath(address), scheme_of(address)
    if scheme != "file":
        raise InvalidOption(
            f"{text}: this has to be a local path, and {scheme}:// is none. Give a directory, such as one where the "
            f"bucket is mounted"
        )
    return os.path.abspath(text.removeprefix("file://"))


def open_store(address: str | os.PathLike[str], *, direct: bool = True) -> Store:
    """Open the store of the run at an address. Touches no storage.

    ``direct``: read and write past the page cache where the backend has one. Raises ``InvalidOption`` for a scheme
    that no backend has."""
    scheme = scheme_of(address)
    text = os.fspath(address)
    if scheme != "file" and "://" not in text:
        raise InvalidOption(
            f"{text}: this is an address of {scheme}:// that has lost a slash, as in a pathlib.Path. Give it as a "
            f"string, {scheme}://…; for a local directory of that name give ./{text}"
        )
    if scheme not in _BACKENDS:
        raise InvalidOption(
            f"{text}: there is no storage backend for {scheme}://, only {', '.join(sorted(_BACKENDS))}. Give a path, "
            f"such as a directory where the bucket is mounted"
        )
    store: Store = importlib.import_module(_BACKENDS[scheme]).open_at(text, direct=direct)
    return store
