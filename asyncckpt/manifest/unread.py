"""Whoever lists a run wants to know of each manifest what stands before its components, which are most of its text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from asyncckpt.manifest.records import ComponentRecord

_COMPONENTS: Final = b',"components":'
#: So many places that look like the beginning of the components are tried: a user's config may have such keys, too.
_TRIES: Final = 4


def heads_of(body: bytes) -> Iterator[bytes]:
    """Yield what may be the text of a manifest without its components: one JSON object, if it is any. The components
    have to come last, as ``encode`` puts them. ``body``: the text up to the manifest's digest."""
    at = -1
    for _ in range(_TRIES):
        at = body.find(_COMPONENTS, at + 1)
        if at < 0:
            return
        # where the key is nested, brackets are open there, and this is no JSON
        yield body[:at] + b"}"


class UnreadComponents(Mapping[str, ComponentRecord]):
    """``UnreadComponents`` are the components of a manifest of which only the rest was parsed. They are parsed, and
    checked, when they are first looked at, which raises what ``manifest.json.decode`` does. Thread-safe, though two
    threads may parse them twice."""

    __slots__ = ("_components", "_parse")

    def __init__(self, parse: Callable[[], Mapping[str, ComponentRecord]]) -> None:
        self._parse = parse
        self._components: Mapping[str, ComponentRecord] | None = None

    def read(self) -> Mapping[str, ComponentRecord]:
        """Return the components. Raises ``ManifestInvalid`` and ``VersionUnsupported``."""
        if self._components is None:
            self._components = self._parse()
        return self._components

    def __getitem__(self, name: str) -> ComponentRecord:
        return self.read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.read())

    def __len__(self) -> int:
        return len(self.read())
