"""Manifests made to do harm, their own digest right: each is refused with a typed error, in time linear in its size."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from asyncckpt import CheckpointDamaged
from asyncckpt.manifest import json as manifest
from asyncckpt.manifest import overlaps

DIGEST = "00000000"
#: Where quadratic work takes minutes, linear work takes a second or two.
SECONDS = 20.0


def body(**changes: Any) -> dict[str, Any]:
    """A small good manifest: ``f`` with ``n`` extents of four bytes, ``t`` in them."""
    return {
        "format": "asyncckpt",
        "format_version": 2,
        "step": 1,
        "name": "s",
        "attempt": "u",
        "kind": "full",
        "created_unix_seconds": 1.5,
        "world_size": 1,
        "shard_format": "safetensors",
        "digest": "crc32c",
        "layout": "",
        "metrics": {},
        "config": None,
        "environment": {},
        "codec": {"name": "zstd", "options": {}},
        "files": [file("f", 4)],
        "components": {"c": component()},
        **changes,
    }


def file(name: str, extents: int, **more: Any) -> dict[str, Any]:
    rows = [[4 * i, 4, DIGEST, DIGEST, 4] for i in range(extents)]
    return {"name": name, "nbytes": 4 * extents, "extents": rows, **more}


def component(parts: list[Any] | None = None, count: int = 4, **more: Any) -> dict[str, Any]:
    parts = [["f", 0, count]] if parts is None else parts
    tensor = {"dtype": "F32", "shape": [count], "chunk": 4, "run": 4 * count, "padded": False, "parts": parts}
    return {"kind": "module", "tensors": {"t": tensor}, "aliases": {}, **more}


def decode(content: dict[str, Any]) -> manifest.Manifest:
    return manifest.decode(manifest.seal(json.dumps(content).encode()[:-1]), "hostile")


def layered(order: Any, part: Any) -> dict[str, Any]:
    files = [file("base/a/f", 4, plan="p"), file("f", 4, plan="p", bases=["base/a/f"], order=order)]
    return body(files=files, components={"c": component([part], 3)})


def boxed(*boxes: Any, shape: tuple[int, ...] = (2, 2)) -> dict[str, Any]:
    """``t`` in boxes of a file of 16 bytes."""
    tensor = {"dtype": "F32", "shape": list(shape), "boxes": list(boxes)}
    return body(components={"c": component() | {"tensors": {"t": tensor}}})


#: The rows of a 2 x 2 tensor.
UPPER, LOWER = [[0, 0], [1, 2], "f", 0, 8], [[1, 0], [1, 2], "f", 8, 16]


def test_the_body_these_attacks_start_from_is_good() -> None:
    assert decode(body()).files[0].name == "f"
    assert len(decode(boxed(UPPER, LOWER)).components["c"].tensors["t"].boxes) == 2
    assert decode(boxed([[], [], "f", 0, 4], shape=())).components["c"].tensors["t"].nbytes == 4
    assert decode(layered([2, 1, 3], ["f", 1, 3])).files[1].order == (2, 1, 3)


ATTACKS: dict[str, Callable[[], dict[str, Any]]] = {
    "a time no float can hold": lambda: body(created_unix_seconds=10**400),
    "a metric no float can hold": lambda: body(metrics={"loss": -(10**400)}),
    "an order of floats": lambda: layered([1.0, 2, 3], ["f", 1, 3]),
    "an order of booleans": lambda: layered([True, 2, 3], ["f", 1, 3]),
    "an order that is no permutation": lambda: layered([1, 1, 3], ["f", 1, 3]),
    "a difference to a header": lambda: layered([2, 1, 3], ["f", 0, 3]),
    "an extent of a terabyte": lambda: body(
        files=[{"name": "f", "nbytes": 1 << 40, "extents": [[0, 1 << 40, DIGEST]]}], components={}
    ),
    "two parts in one file": lambda: body(components={"c": component([["f", 0, 2], ["f", [2, 3]]])}),
    "an extent that is a chunk twice": lambda: body(components={"c": component(), "d": component()}),
    **{
        f"a file called {name!r:.20}": (lambda name=name: body(files=[file(name, 4)], components={}))
        for name in (
            *("..", ".", "", "/etc/passwd", "../x", "a/../b", "a//b", "a/b/c/d", "x\0y", "a\\b", "-rf", ".hidden"),
            *("manifest.json", "Manifest.JSON", "manifest.json/x", "a\n", "é", "\ud800", "x" * 256, "a/", "/"),
        )
    },
    "two files of one name": lambda: body(files=[file("g", 1), file("g", 1)], components={}),
    "two files that differ in case": lambda: body(files=[file("g", 1), file("G", 1)], components={}),
    "a file that is a directory": lambda: body(files=[file("g", 1), file("g/h", 1)], components={}),
    "a component with a dot": lambda: body(components={"a.b": component()}),
    "a component that climbs": lambda: body(components={"..": component()}),
    "an unknown codec": lambda: body(codec={"name": "os.system", "options": {}}),
    "a codec with options it lacks": lambda: body(codec={"name": "zstd", "options": {"dict_data": "x"}}),
    "an unknown digest": lambda: body(digest="md5"),
    "a version from the future": lambda: body(format_version=10**40),
    "a negative shape": lambda: body(components={"c": component() | {"tensors": {"t": ["F32", [-1], "f", 0, 4]}}}),
    "a shape that overflows": lambda: body(
        components={"c": component() | {"tensors": {"t": ["F32", [1 << 33, 1 << 33], "f", 0, 16]}}}
    ),
    "tensors that overlap": lambda: body(
        components={"c": component() | {"tensors": {"a": ["F32", [2], "f", 0, 8], "b": ["F32", [2], "f", 4, 12]}}}
    ),
    "a tensor past the end": lambda: body(components={"c": component() | {"tensors": {"a": ["F32", [5], "f", 0, 20]}}}),
    "a chunk that is two in one part": lambda: body(components={"c": component([["f", [0, 0]]], 2)}),
    "a box that is no list": lambda: boxed("upper", LOWER),
    "a box of four things": lambda: boxed(UPPER[:4], LOWER),
    "a box at no place": lambda: boxed([None, *UPPER[1:]], LOWER),
    "a box of one dimension": lambda: boxed([[0], [2], "f", 0, 8], LOWER),
    "a box at a place of one dimension": lambda: boxed([[0], *UPPER[1:]], LOWER),
    "a box past the end of its tensor": lambda: boxed(UPPER, [[2, 0], *LOWER[1:]]),
    "a box of other bytes than its shape": lambda: boxed(UPPER, [*LOWER[:4], 12]),
    "a box that is missing": lambda: boxed(UPPER),
    "a box twice": lambda: boxed(UPPER, UPPER),
    "boxes that cross": lambda: boxed([[0, 0], [2, 1], "f", 0, 8], [[0, 0], [1, 2], "f", 8, 16], shape=(2, 2)),
    "two boxes of a single number": lambda: boxed([[], [], "f", 0, 4], [[], [], "f", 4, 8], shape=()),
    "boxes that share bytes": lambda: boxed(UPPER, [*LOWER[:3], 4, 12]),
    "boxes in a file of chunks": lambda: body(
        components={"c": component(count=2), "d": boxed(UPPER, LOWER)["components"]["c"]}
    ),
    "a chunk of a terabyte": lambda: body(
        components={"c": component() | {"tensors": {"t": component()["tensors"]["t"] | {"chunk": 1 << 40}}}}
    ),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_hostile_manifest_is_refused_with_a_typed_error(attack: Callable[[], dict[str, Any]]) -> None:
    from asyncckpt import VersionUnsupported

    with pytest.raises((CheckpointDamaged, VersionUnsupported)) as refused:
        decode(attack())
    assert len(str(refused.value)) < 2000, "the message repeats what the attacker wrote"


def rows(*extents: list[Any]) -> dict[str, Any]:
    """``f`` with these extents, and no component."""
    return body(files=[{"name": "f", "nbytes": 4 * len(extents), "extents": list(extents)}], components={})


def chunked(parts: list[Any] | None = None, **changes: Any) -> dict[str, Any]:
    """``t`` in chunks, with these fields changed."""
    good = component(parts)
    return body(components={"c": good | {"tensors": {"t": good["tensors"]["t"] | changes}}})


def whole(row: list[Any]) -> dict[str, Any]:
    """``t`` in one piece."""
    return body(components={"c": component() | {"tensors": {"t": row}}})


def plain_chunks(nbytes: int) -> dict[str, Any]:
    """``t`` in two chunks of ``nbytes``, by extents of four bytes that do not say what they hold."""
    short = {"name": "f", "nbytes": 8, "extents": [[0, 4, DIGEST], [4, 4, DIGEST]]}
    tensor = {"dtype": "F32", "shape": [nbytes // 2], "chunk": nbytes, "run": 2 * nbytes, "padded": False}
    return body(files=[short], components={"c": component() | {"tensors": {"t": tensor | {"parts": [["f", 0, 2]]}}}})


#: Each with what the refusal says: a rule is not there because another one happens to refuse the same.
BROKEN_ROWS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "an extent of four things": (lambda: rows([0, 4, DIGEST, DIGEST]), "malformed extent of 'f'"),
    "a content digest in words": (lambda: rows([0, 4, DIGEST, "words", 4]), "malformed content digest of 'f'"),
    "a content digest that is a number": (lambda: rows([0, 4, DIGEST, 7, 4]), "malformed content digest of 'f'"),
    "an extent that holds more than it has": (lambda: rows([0, 4, DIGEST, DIGEST, 5]), "holds more than its bytes"),
    "a plan that is a list": (lambda: body(files=[file("f", 4, plan=["p"])]), "malformed plan of 'f'"),
    "a base twice": (
        lambda: body(files=[file("base/a/f", 4, plan="p"), file("f", 4, plan="p", bases=["base/a/f"] * 2)]),
        "with a base twice",
    ),
    "a shape in words": (lambda: whole(["F32", "4", "f", 0, 16]), "malformed shape"),
    "a shape of 65 dimensions": (lambda: whole(["F32", [1] * 65, "f", 0, 4]), "malformed shape"),
    "a run that does not divide the tensor": (lambda: chunked(run=12), "chunks that do not fit its shape"),
    "a chunk of half a number": (lambda: chunked(chunk=2), "chunks that do not fit its shape"),
    "a chunk too few": (lambda: chunked([["f", 0, 3]]), "lacks chunks of tensor 't'"),
    "a chunk of the wrong size": (lambda: plain_chunks(8), "chunk of tensor 't' of the wrong size"),
    "chunks in a file that is not listed": (lambda: chunked([["g", 0, 4]]), "chunks of tensor 't' into a file"),
    "a part of one thing": (lambda: chunked([["f"]]), "chunks of tensor 't' into a file"),
    "chunks in words": (lambda: chunked([["f", "0123"]]), "in extents that are not there"),
}


def test_the_rows_that_are_broken_are_good_before() -> None:
    assert decode(rows([0, 4, DIGEST, DIGEST, 4])).files[0].extents[0].payload_bytes == 4
    for good in (whole(["F32", [1] * 64, "f", 0, 4]), chunked(), chunked([["f", [0, 1, 2, 3]]])):
        assert "t" in decode(good).components["c"].tensors
    assert decode(plain_chunks(4)).components["c"].tensors["t"].nbytes == 8


@pytest.mark.parametrize(("broken", "rule"), BROKEN_ROWS.values(), ids=BROKEN_ROWS)
def test_a_row_that_breaks_a_rule_is_refused_by_that_rule(broken: Callable[[], dict[str, Any]], rule: str) -> None:
    with pytest.raises(CheckpointDamaged, match=rule):
        decode(broken())


def test_more_boxes_than_can_be_compared_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing each with each takes quadratic time: there is an end to it."""
    places = [(row, column) for row in range(4) for column in range(4)]
    grid = boxed(*([[*at], [1, 1], "f", 4 * i, 4 * i + 4] for i, at in enumerate(places)), shape=(4, 4))
    grid["files"] = [file("f", 16)]
    assert decode(grid).components["c"].tensors["t"].nbytes == 64
    monkeypatch.setattr(overlaps, "_MAX_COMPARED", 10)
    with pytest.raises(CheckpointDamaged, match="too many"):
        decode(grid)


@pytest.mark.parametrize(
    "text",
    [
        b'{"step":NaN',
        b'{"step":Infinity',
        b'{"step":1e999',
        b'{"step":1,"step":1',
        b'{"step":' + b"[" * 100_000,
        b'{"step":' + b"9" * 1_000_000,
        b'{"a":' * 100_000 + b"1",
        b'{"a":"\xff"',
        b"\xef\xbb\xbf{",
        b"",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_json_should_not_be_is_refused(text: bytes) -> None:
    began = time.process_time()
    with pytest.raises(CheckpointDamaged):
        manifest.decode(manifest.seal(text), "hostile")
    assert time.process_time() - began < SECONDS


def _few_characters_for_many_extents(n: int) -> dict[str, Any]:
    """Each part names all extents of the file in thirty characters."""
    tensors = {f"t{i}": component([["f", 0, n]], n)["tensors"]["t"] for i in range(n // 4)}
    return body(files=[file("f", n)], components={"c": component() | {"tensors": tensors}})


def _layered_order(n: int) -> dict[str, Any]:
    files = [
        file("base/a/f", n, plan="p"),
        file("f", n, plan="p", bases=["base/a/f"], order=[*range(n - 1, 0, -1)]),
    ]
    return body(files=files, components={"c": component([["f", 1, n - 1]], n - 1)})


def _wide(n: int) -> dict[str, Any]:
    files = [file(f"f{i}", 1) for i in range(n)]
    tensors = {f"t{i}": ["F32", [1], f"f{i}", 0, 4] for i in range(n)}
    aliases = {f"a{i}": "t0" for i in range(n)}
    return body(files=files, components={"c": {"kind": "module", "tensors": tensors, "aliases": aliases}})


@pytest.mark.parametrize("attack", [_few_characters_for_many_extents, _layered_order, _wide])
def test_a_large_manifest_takes_time_linear_in_its_size(attack: Callable[[int], dict[str, Any]]) -> None:
    data = manifest.seal(json.dumps(attack(20_000)).encode()[:-1])
    began = time.process_time()
    try:
        found = manifest.decode(data, "hostile")
    except CheckpointDamaged:
        pass
    else:
        for record in found.files:
            record.chunk_numbers()
    assert time.process_time() - began < SECONDS
