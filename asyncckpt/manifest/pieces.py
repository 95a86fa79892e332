"""Long JSON text is made piece by piece, and what is known from the save before is not made again.

One call that turns ten thousand entries into text holds the interpreter until it is done, and every other thread with
it, however many cores there are. Between two pieces another thread can run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Final

from asyncckpt import jsontree

#: So many entries of a dict are turned into text at once: that takes a millisecond or so.
_ENTRIES: Final = 500
#: A text that is shorter is made anew: to keep it would save nothing.
_KEPT_BYTES: Final = 4096


def dumps_in_pieces(tree: Any, depth: int = 3) -> bytes:
    """Return what ``jsontree.dumps`` does, without its newline, and let other threads run meanwhile: dicts of many
    entries, down to ``depth`` levels, are turned into text a few hundred entries at a time. Raises ``ValueError`` for
    nan and infinities."""
    return b"".join(_pieces(tree, depth))


def _pieces(tree: Any, depth: int) -> Iterator[bytes]:
    if not isinstance(tree, dict) or not tree or not depth:
        yield _text(tree)
    elif len(tree) > _ENTRIES:
        entries, mark = iter(tree.items()), b"{"
        while part := dict(islice(entries, _ENTRIES)):
            yield mark + _text(part)[1:-1]
            mark = b","
        yield b"}"
    else:
        mark = b"{"
        for key, value in tree.items():
            yield mark + _text(key) + b":"
            yield from _pieces(value, depth - 1)
            mark = b","
        yield b"}"


def _text(tree: Any) -> bytes:
    return jsontree.dumps(tree)[:-1]


class KeptTexts:
    """``KeptTexts`` makes the text of the trees of one save after the other. Where a component, or an entry of it, is
    the very object that it was, its text is kept: encoded trees are never changed. For one thread at a time."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], tuple[Any, bytes]] = {}

    def dumps(self, trees: Mapping[str, Any]) -> bytes:
        """Return the text that ``jsontree.dumps`` returns. Raises ``ValueError`` for nan and infinities."""
        kept: dict[tuple[str, str], tuple[Any, bytes]] = {}
        parts: list[bytes] = []
        mark = b"{"
        for name, tree in trees.items():
            parts += [mark, _text(name), b":"]
            mark = b","
            if not isinstance(tree, dict) or not tree:
                parts.append(self._entry((name, ""), tree, kept))
                continue
            inner = b"{"
            for key, value in tree.items():
                parts += [inner, _text(key), b":", self._entry((name, key), value, kept)]
                inner = b","
            parts.append(b"}")
        self._kept = kept
        return b"".join([*parts, b"}\n"]) if trees else b"{}\n"

    def _entry(self, place: tuple[str, str], value: Any, kept: dict[tuple[str, str], tuple[Any, bytes]]) -> bytes:
        found = self._kept.get(place)
        text = found[1] if found is not None and found[0] is value else dumps_in_pieces(value)
        if isinstance(value, dict | list) and len(text) > _KEPT_BYTES:
            kept[place] = value, text
        return text
