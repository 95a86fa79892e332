"""Structure-aware mutation: valid JSON stays JSON, names become attacks, numbers become edges, frames keep headers."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

#: File and component names nobody should be able to use.
HOSTILE_NAMES = (
    *("..", ".", "", "/etc/passwd", "../../x", "a/../b", "a//b", "a/b/c/d/e", "x\0y", "a\\b", "-rf", ".hidden", "con"),
    *(
        "MANIFEST.JSON",
        "manifest.json",
        "manifest.json/x",
        "state.json",
        "STATE.json",
        "é",
        "\ud800",
        "\u202e",
        "x" * 256,
    ),
    *("a\nb", "\x1b[2J", "__metadata__", "zarr.json", ".nfs1", "{}", "%s", "$", "tensor", "params", "$ref", "n" * 4000),
)
#: Where arithmetic goes wrong.
EDGES = (
    *(0, 1, -1, 2, 3, 4, 7, 8, 15, 16, 255, 256, 4095, 4096, 4097, 65_535, 65_536),
    *(1 << 20, 1 << 30, (1 << 30) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 53, (1 << 62) - 1, 1 << 62),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), 10**400, -(10**400), (1 << 61) - 1),
    *(0.0, -0.0, 0.5, 1.0, 2.0, 1e308, -1e308, 5e-324, 1e22),
)
WORDS = (
    *("F32", "F64", "BF16", "BOOL", "C64", "F4", "U8", "float32", "bfloat16", "r16", "none", "planes", "zstd", "blosc"),
    *(
        "lz4",
        "auto",
        "pickle",
        "xxh3-128",
        "sha256",
        "crc32c",
        "blake3",
        "md5",
        "full",
        "weights",
        "module",
        "optimizer",
    ),
    *("nan", "inf", "-inf", "planes:", "asyncckpt", "asyncckpt-chunks", "array", "group", "safetensors", "zarr"),
    *(
        "tuple",
        "set",
        "frozenset",
        "dict",
        "OrderedDict",
        "Counter",
        "defaultdict",
        "deque",
        "Size",
        "Namespace",
        "int",
    ),
    *(
        "SimpleNamespace",
        "float",
        "complex",
        "str",
        "bytes",
        "bytearray",
        "numpy",
        "ndarray",
        "dtype",
        "device",
        "cuda",
    ),
    *(
        "<f4",
        "|u1",
        ">i8",
        "|O",
        "meta",
        "cpu",
        "mkldnn",
        "ffff",
        "AAAA",
        "____",
        "7ff0000000000000",
        "0x10",
        " 1 ",
        "-1",
    ),
)
_SNIPPETS = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"\xff",
    b"\xed\xa0\x80",
    b"\0",
    b"\xef\xbb\xbf",
    b"//",
    b",",
    b"'",
)


def json_mutated(data: bytes, rng: random.Random, max_size: int) -> bytes:
    """Another document near ``data``; now and then one that is no JSON any more."""
    if rng.random() < 0.08:
        return _broken(data, rng)[:max_size]
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return _broken(data, rng)[:max_size]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        tree = _tree_mutated(tree, rng)
    try:
        out = json.dumps(tree, separators=(",", ":")).encode()
    except ValueError:  # a number has grown past the digits that Python prints
        return _broken(data, rng)[:max_size]
    if rng.random() < 0.03:
        out = _key_twice(out, rng)
    return out if len(out) <= max_size else data[:max_size]


def bytes_mutated(data: bytes, rng: random.Random, max_size: int) -> bytes:
    """Bits, bytes, edges of little-endian fields, pieces cut, doubled and moved."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.choice((0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))
        elif kind == 2:
            width = rng.choice((2, 4, 8))
            value = int(rng.choice(EDGES[:30])) + rng.choice((-1, 0, 1))
            out[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        elif kind == 3:
            del out[at : at + rng.choice((1, 2, 4, 16, len(out)))]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.choice((1, 2, 4, 16)))
        elif kind == 5 and out:
            start = rng.randrange(len(out))
            out[at:at] = out[start : start + rng.choice((1, 4, 16, 64))]
        elif len(out) > 16:  # of a header, rather than of what follows it
            out[rng.randrange(16)] = rng.randrange(256)
    return bytes(out[:max_size])


def _slots(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    stack = [tree]
    while stack and len(found) < 3000:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], dict | list):
                stack.append(node[key])
    return found


def _tree_mutated(tree: Any, rng: random.Random) -> Any:
    slots = _slots(tree)
    if not slots or rng.random() < 0.01:
        return _value(rng)
    node, key = rng.choice(slots)
    kind = rng.randrange(10)
    if kind <= 2:
        node[key] = _near(node[key], rng)
    elif kind == 3:
        node[key] = _value(rng)
    elif kind == 4:
        del node[key]
    elif kind == 5:
        other, name = rng.choice(slots)
        node[key] = copy.deepcopy(other[name])
    elif kind == 6 and isinstance(node, dict):
        node[rng.choice((*HOSTILE_NAMES, *WORDS))] = node[key] if rng.random() < 0.5 else _value(rng)
    elif kind == 7 and isinstance(node, dict):  # the same under another name
        node[rng.choice((*HOSTILE_NAMES, key.upper(), key + " ", key.replace("0", "1")))] = node.pop(key)
    elif isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), node[key] if rng.random() < 0.5 else _value(rng))
    else:
        node[key] = [node[key]] if rng.random() < 0.5 else {"$": rng.choice(WORDS), "v": node[key]}
    return tree


def _near(value: Any, rng: random.Random) -> Any:
    if type(value) is bool:
        return not value
    if type(value) is int:
        steps = (
            value + 1,
            value - 1,
            -value,
            value * 2,
            value // 2,
            value + 4096,
            value ^ 1,
            float(max(-9, min(value, 1 << 52))),
        )
        return rng.choice((*steps, rng.choice(EDGES)))
    if isinstance(value, float):
        return rng.choice(EDGES)
    if isinstance(value, str):
        cut = rng.randrange(len(value) + 1)
        swapped = value[:cut] + rng.choice("0fF.#~/\0 ") + value[cut + 1 :]
        return rng.choice(
            (swapped, value[:cut], value * 2, value.upper(), rng.choice(HOSTILE_NAMES), rng.choice(WORDS))
        )
    if isinstance(value, list):
        return rng.choice((value[::-1], value * 2, value[:-1], [value], {}, [True for _ in value], [*map(str, value)]))
    if isinstance(value, dict):
        return rng.choice(([*value], [*value.values()], {}, {"$": rng.choice(WORDS), "v": value}, None))
    return _value(rng)


def _value(rng: random.Random) -> Any:
    name = rng.choice(HOSTILE_NAMES + WORDS)
    nested: Any = name
    for _ in range(rng.choice((1, 2, 3, 60))):
        nested = [nested] if rng.random() < 0.5 else {"$": rng.choice(WORDS), "v": [nested]}
    return rng.choice(
        (None, True, False, rng.choice(EDGES), rng.choice(EDGES), name, [], {}, nested, [name, 1, 2, name])
    )


def _broken(data: bytes, rng: random.Random) -> bytes:
    cut = rng.randrange(len(data) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        return data[:cut] + rng.choice(_SNIPPETS) + data[cut:]
    if kind == 1:
        return data[:cut]
    if kind == 2:
        depth = rng.choice((100, 499, 501, 2000))
        return data[:cut] + rng.choice((b"[", b'{"a":')) * depth + data[cut:]
    return data[:cut] + b"9" * rng.choice((20, 400, 4299, 4301)) + data[cut:]


def _key_twice(data: bytes, rng: random.Random) -> bytes:
    at = data.find(b'{"', rng.randrange(len(data) + 1))
    end = data.find(b'":', at)
    return data if at < 0 or end < 0 else data[: at + 1] + data[at + 1 : end + 2] + b"0," + data[at + 1 :]
