"""This package turns plain Python values into JSON and back, exactly and without pickle; tensors become placeholders.

Values that JSON has are stored as they are: None, bool, int, finite float, str, list, and dict with str keys. Every
other value is an object ``{"$": tag, "v": …}``. A dict that has a ``"$"`` key of its own is stored with a tag, too, so
the two cannot be confused. Types are found in one table by their exact type, and in another one by their tag: nothing
is imported or called because a stored name says so.
"""

from __future__ import annotations

from asyncckpt.jsontree.decode import decode
from asyncckpt.jsontree.encode import Encoded, encode
from asyncckpt.jsontree.strict import dumps, loads
from asyncckpt.jsontree.typed_values import Live, needs_live
from asyncckpt.jsontree.versions import version_of
from asyncckpt.jsontree.wrapper_tensors import Wrapper, is_wrapper
from asyncckpt.types import JsonValue

__all__ = [
    "Encoded",
    "Live",
    "Wrapper",
    "decode",
    "dumps",
    "encode",
    "is_wrapper",
    "loads",
    "needs_live",
    "tensor_names",
    "version_of",
]


def tensor_names(tree: JsonValue) -> list[str]:
    """Return the names of all tensors of an encoded tree, in the order in which ``encode`` met them."""
    names: list[str] = []
    stack: list[JsonValue] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(reversed(node))
        elif isinstance(node, dict):
            name = node.get("v")
            if node.get("$") == "tensor" and isinstance(name, str):
                names.append(name)
            else:
                stack.extend(reversed(node.values()))
    return names
