"""The manifest: what was written is what is read, and nothing an attacker writes is believed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples

from asyncckpt import AsyncCkptError, Checkpointer, ManifestInvalid
from asyncckpt.formats.safetensors import header_length, image, parse_header
from asyncckpt.manifest import json as manifests
from asyncckpt.types import TensorSpec


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("run")
    with Checkpointer(path, config={"a": (1, 2)}) as run:
        state = {"t": torch.arange(6).reshape(2, 3), "u": {"x": torch.ones(3), "y": torch.zeros(2)}}
        report = run.save(4, state, metrics={"loss": 1.25, "bad": float("nan")}).result()
    return Path(report.path, "manifest.json").read_bytes()


def _reseal(data: bytes, change: Any) -> bytes:
    body = json.loads(data)
    del body["manifest_digest"]
    change(body)
    return manifests.seal(json.dumps(body).encode()[:-1])


def test_what_was_recorded_is_read_back(valid: bytes) -> None:
    found = manifests.decode(valid, "here")
    assert (found.step, found.kind, found.world_size, found.digest) == (4, "full", 1, "xxh3-128")
    assert found.metrics["loss"] == 1.25
    assert found.metrics["bad"] != found.metrics["bad"]
    assert found.config == {"a": {"$": "tuple", "v": [1, 2]}}
    assert {"python", "torch", "cuda", "asyncckpt", "host"} <= set(found.environment)
    assert found.components["t"].tensors["value"].shape == (2, 3)


def _set(path: str, value: Any) -> Any:
    def change(body: Any) -> None:
        *keys, last = path.split("/")
        for key in keys:
            body = body[int(key) if key.isdigit() else key]
        body[int(last) if last.isdigit() else last] = value

    return change


HOSTILE: dict[str, Any] = {
    "path escapes": _set("files/0/name", "../../etc/passwd"),
    "absolute": _set("files/0/name", "/etc/passwd"),
    "hidden": _set("files/0/name", ".hidden"),
    "NUL": _set("files/0/name", "a\0b"),
    "backslash": _set("files/0/name", "a\\b"),
    "twice": lambda b: b["files"].append(dict(b["files"][0])),
    "differs in case": lambda b: b["files"].append({**b["files"][0], "name": b["files"][0]["name"].upper()}),
    "lists itself": lambda b: b["files"].append({**b["files"][0], "name": "manifest.json"}),
    "negative size": _set("files/0/nbytes", -1),
    "size is a float": _set("files/0/nbytes", 1.0),
    "size is true": _set("files/0/nbytes", True),
    "gap in extents": _set("files/0/extents/0/0", 4096),
    "extent past the end": _set("files/0/extents/0/1", 1 << 40),
    "no extents": _set("files/0/extents", []),
    "digest too short": _set("files/0/extents/0/2", "00"),
    "digest no hex": _set("files/0/extents/0/2", "g" * 32),
    "unknown digest": _set("digest", "md5"),
    "tensor past the file": _set("components/t/tensors/value/4", 1 << 50),
    "tensor in an unlisted file": _set("components/t/tensors/value/2", "nowhere"),
    "shape does not fit": _set("components/t/tensors/value/1", [2, 4]),
    "negative shape": _set("components/t/tensors/value/1", [-2, -3]),
    "overflowing shape": _set("components/t/tensors/value/1", [1 << 61, 1 << 61, 8]),
    "unknown dtype": _set("components/t/tensors/value/0", "F128"),
    "unaligned": lambda b: b["components"]["t"]["tensors"].update(
        value=["I64", [1], b["components"]["t"]["tensors"]["value"][2], 4097, 4105]
    ),
    "overlap": lambda b: b["components"]["t"]["tensors"].update(again=b["components"]["t"]["tensors"]["value"]),
    "alias to nothing": _set("components/t/aliases", {"x": "y"}),
    "component escapes": lambda b: b["components"].update({"../x": b["components"]["t"]}),
    "component with a dot": lambda b: b["components"].update({"t.x": b["components"]["t"]}),
    "unknown kind": _set("kind", "executable"),
    "name escapes": _set("name", "../x"),
    "step is text": _set("step", "4"),
    "metrics are text": _set("metrics", {"loss": "low"}),
    "not ours": _set("format", "other"),
    "no files": lambda b: b.pop("files"),
    "a list": lambda b: b.update(files={}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_refused_with_the_field_named(change: Any, valid: bytes) -> None:
    with pytest.raises(ManifestInvalid, match="here: the manifest "):
        manifests.decode(_reseal(valid, change), "here")


@pytest.mark.parametrize(
    "body",
    [b'{"step":NaN', b'{"a":1,"a":2', b"[" * 100_000, b'{"a":' * 5000, b"\xff\xfe", b"", b'{"step":1e999'],
    ids=["NaN", "duplicate key", "deep list", "deep dict", "no text", "empty", "overflow"],
)
def test_json_that_is_no_manifest_is_refused(body: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        manifests.decode(manifests.seal(body), "here")


@examples(300)
@given(data=st.data())
def test_random_edits_of_any_field_never_raise_anything_untyped(data: st.DataObject, valid: bytes) -> None:
    junk = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    )

    def change(body: Any) -> None:
        node, key = body, data.draw(st.sampled_from(sorted(body)))
        while isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
            node = node[key]
            key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        node[key] = data.draw(junk)

    with contextlib.suppress(AsyncCkptError):
        manifests.decode(_reseal(valid, change), "here")


def _header(entries: Any) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("head", "size"),
    [
        (b"\xff" * 8, 1000),
        (b"\0" * 7, 7),
        (_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}), 0),
        (_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}), 12),
        (_header({"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}), 8),
        (_header({"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}), 4),
        (_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}}), 4),
        (_header(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1}'), 1),
        (
            _header(
                {
                    "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                    "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
                }
            ),
            3,
        ),
        (_header([1]), 0),
    ],
)
def test_a_hostile_safetensors_header_is_refused(head: bytes, size: int) -> None:
    with pytest.raises(ValueError, match="file"):
        parse_header(head, len(head) + size if len(head) > 8 else size, "file")


def test_our_header_is_parsed_to_what_was_laid_out() -> None:
    specs = [TensorSpec("a", "F32", (3,), 12), TensorSpec("é", "U8", (), 1), TensorSpec("z", "U8", (0,), 0)]
    header, begins, nbytes = image(specs)
    assert len(header) % 4096 == 0
    assert header_length(header, nbytes, "x") == len(header) - 8
    found = {p.spec.name: (p.begin, p.end) for p in parse_header(header, nbytes, "x")}
    assert found == {s.name: (b, b + s.nbytes) for s, b in zip(specs, begins, strict=True)}
