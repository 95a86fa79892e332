"""Plain Python values ↔ JSON, exactly and without pickle; tensors become placeholders.

What JSON has is stored as it is: None, bool, int, finite float, str, list, and dict with str keys. All else is an
object ``{"$": tag, "v": …}``; a dict that has a ``"$"`` key of its own is stored tagged, so the two are never mixed
up. Types are looked up in one table each way, by exact type and by tag: nothing is imported or called by a stored name.
"""

from __future__ import annotations

from asyncckpt.jsontree.decode import decode
from asyncckpt.jsontree.encode import encode
from asyncckpt.jsontree.strict import dumps, loads
from asyncckpt.types import JsonValue

__all__ = ["decode", "dumps", "encode", "loads", "tensor_names"]


def tensor_names(tree: JsonValue) -> list[str]:
    """The names of all tensors of an encoded tree, in the order ``encode`` met them."""
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
