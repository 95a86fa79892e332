"""What a manifest says of a component beside its tensors: the class of the live object, and strides that a tensor can
have."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from asyncckpt.errors import ManifestInvalid
from asyncckpt.manifest import json as manifest
from asyncckpt.manifest.parse import is_dense
from asyncckpt.manifest.records import ComponentRecord, Manifest, TensorRecord


def _manifest(component: ComponentRecord) -> Manifest:
    nbytes = sum(tensor.nbytes for tensor in component.tensors.values())
    return Manifest(
        step=1,
        name="step-00000001",
        attempt="a" * 32,
        kind="full",
        created_unix_seconds=1.0,
        world_size=1,
        shard_format="safetensors",
        digest="xxh3-128",
        layout="",
        metrics={},
        config=None,
        environment={},
        files=(manifest.whole_file("data", bytes(nbytes), lambda _data: "0" * 32),),
        components={"model": component},
    )


def _record(**changes: Any) -> ComponentRecord:
    weight = TensorRecord("F32", (2, 3, 4), "data", 0, 96)
    return replace(ComponentRecord("module", {"weight": weight}, {}), **changes)


def test_class_strides_and_parent_are_read_as_they_were_written() -> None:
    component = _record(type_name="torch.nn.Linear", strides={"weight": (12, 1, 3)})
    read = manifest.decode(manifest.encode(replace(_manifest(component), parent="b" * 32)), "here")
    assert read.parent == "b" * 32
    assert read.components["model"] == component


def test_manifests_without_them_have_none() -> None:
    data = manifest.encode(_manifest(_record()))
    assert all(key not in data for key in (b'"class"', b'"strides"', b'"parent"'))
    read = manifest.decode(data, "here")
    assert (read.parent, read.components["model"].type_name, read.components["model"].strides) == ("", "", {})


@pytest.mark.parametrize(
    "strides",
    [
        {"other": (12, 4, 1)},
        {"weight": (4, 1)},
        {"weight": (0, 4, 1)},
        {"weight": (24, 8, 2)},
        {"weight": (1 << 40, 4, 1)},
    ],
    ids=["of no tensor", "too few", "overlapping", "with gaps", "huge"],
)
def test_strides_that_no_dense_tensor_has_are_refused(strides: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ManifestInvalid, match="strides"):
        manifest.decode(manifest.encode(_manifest(_record(strides=strides))), "here")


@pytest.mark.parametrize(("key", "value"), [("parent", 3), ("parent", "x" * 2000)])
def test_a_parent_that_is_no_name_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ManifestInvalid, match=key):
        manifest.decode(manifest.encode(replace(_manifest(_record()), **{key: value})), "here")


def test_dense_is_what_torch_calls_dense_without_overlap() -> None:
    for order in itertools.permutations(range(4)):
        tensor = torch.empty(2, 1, 3, 4).permute(order)
        assert is_dense(tensor.shape, tensor.stride())
    for view in (torch.empty(4, 6)[:, ::2], torch.empty(4, 1).expand(4, 3), torch.empty(9).as_strided((3, 3), (1, 1))):
        assert not is_dense(view.shape, view.stride())
