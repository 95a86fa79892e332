"""Rows of tensors that are checked as columns are taken, and refused, as they are one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples

from asyncckpt import Checkpointer, KeepLast, ManifestInvalid, Run, jsontree
from asyncckpt.manifest import json as manifests
from asyncckpt.manifest import parse
from asyncckpt.manifest.pieces import KeptTexts, dumps_in_pieces
from asyncckpt.manifest.records import ExtentRecord, FileRecord
from asyncckpt.manifest.table import TensorTable, table_of

ITEM = {"F64": 8, "F32": 4, "BF16": 2, "U8": 1}
FILES = {
    name: FileRecord(name, nbytes, (ExtentRecord(0, nbytes, "0" * 32),))
    for name, nbytes in {"a.safetensors": 4096, "b.safetensors": 200}.items()
}
_JUNK = (
    st.none() | st.booleans() | st.floats(-9, 9) | st.text(max_size=2) | st.lists(st.integers(0, 3), max_size=2)
) | st.sampled_from([-1, 0, 1, 3, 1 << 62, 1 << 63, 1 << 70, "F32", "a.safetensors", "c.safetensors", [], {}])


@st.composite
def _rows(draw: st.DrawFn) -> dict[str, Any]:
    """Rows of tensors, most of which lie one after the other in their files, and some of which are spoilt."""
    rows: dict[str, Any] = {}
    at = dict.fromkeys(FILES, 0)
    for number in range(draw(st.integers(0, 6))):
        dtype, file = draw(st.sampled_from(sorted(ITEM))), draw(st.sampled_from(sorted(FILES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = ITEM[dtype]
        for one in shape:
            size *= one
        begin = -(-at[file] // ITEM[dtype]) * ITEM[dtype]
        rows[f"t{number}"] = [dtype, shape, file, begin, begin + size]
        at[file] = begin + size
    if rows and draw(st.booleans()):
        row = rows[draw(st.sampled_from(sorted(rows)))]
        change = draw(st.sampled_from(["field", "size", "length", "shift"]))
        if change == "field":
            row[draw(st.integers(0, 4))] = draw(_JUNK)
        elif change == "size" and row[1]:
            row[1][draw(st.integers(0, len(row[1]) - 1))] = draw(_JUNK)
        elif change == "length":
            row.pop()
        else:
            move = draw(st.integers(-8, 8))
            row[3:] = [row[3] + move, row[4] + move]
    return rows


def _parsed(rows: dict[str, Any]) -> Any:
    body = parse.Body({"components": {"m": {"kind": "module", "tensors": rows, "aliases": {}}}}, "here")
    try:
        found = parse.parse_components(body, FILES)
    except ManifestInvalid as error:
        return str(error)
    return {name: dict(component.tensors) for name, component in found.items()}


@examples(500)
@given(rows=_rows())
def test_columns_take_and_refuse_what_single_rows_do(rows: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parse, "table_of", lambda rows, files: None)
        expected = _parsed(rows)
    assert _parsed(rows) == expected
    assert rows == {} or isinstance(expected, str) or table_of(rows, FILES) is not None, "the fast way is never taken"


@pytest.mark.parametrize(
    "row",
    [
        ["U8", [1], "a.safetensors", True, 2],
        ["U8", [0], "a.safetensors", False, 0],
        ["U8", [1], "a.safetensors", 0, True],
        ["U8", [True], "a.safetensors", 0, 1],
        ["U8", [1.0], "a.safetensors", 0, 1],
        ["U8", [1], "a.safetensors", 0.0, 1],
        ["F32", [1], "a.safetensors", 2, 6],
        ["U8", [1 << 32, 1 << 32], "a.safetensors", 0, 0],
        ["F64", [1 << 61], "a.safetensors", 0, 0],
        ["U8", [1] * 65, "a.safetensors", 0, 1],
        ["U8", [-1, -1], "a.safetensors", 0, 1],
        ["U8", [1], "a.safetensors", 4096, 4097],
        ["U8", [1], "a.safetensors", -1, 0],
    ],
    ids=str,
)
def test_a_row_that_only_looks_right_is_refused_among_others(row: list[Any]) -> None:
    good = {f"t{number}": ["U8", [2], "b.safetensors", 2 * number, 2 * number + 2] for number in range(9)}
    assert isinstance(_parsed(good), dict)
    assert isinstance(_parsed({**good, "bad": row}), str)


def test_a_table_is_a_mapping_whose_records_keep_their_identity() -> None:
    rows = {"x": ["F32", [2], "a.safetensors", 0, 8], "none": ["F32", [0], "a.safetensors", 8, 8]}
    table = table_of(rows, FILES)
    assert isinstance(table, TensorTable)
    assert (list(table), len(table), "x" in table, "y" in table, 3 in table) == (["x", "none"], 2, True, False, False)
    assert table["x"] is table["x"] is table.get("x")
    assert (table.get("y"), table.get("y", 7)) == (None, 7)
    with pytest.raises(KeyError):
        table["y"]
    assert (table.nbytes, table.file_names()) == (8, {"a.safetensors"})
    assert [(file, list(begins), list(ends)) for file, begins, ends in table.spans()] == [("a.safetensors", [0], [8])]


# -- text that is made in pieces -------------------------------------------------------------------------------------

_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@examples(200)
@given(saves=st.lists(st.dictionaries(st.text(max_size=3), _TREES, max_size=4), min_size=1, max_size=3))
def test_pieces_are_the_text_that_one_call_makes(saves: list[dict[str, Any]]) -> None:
    kept = KeptTexts()
    wide = {str(number): [number, "x" * 20] for number in range(1200)}
    for number, trees in enumerate(saves):
        given = {**trees, "wide": {"state": wide, "param_groups": [{"lr": number}]}}
        assert kept.dumps(given) == jsontree.dumps(given), "text that was kept stands for something else"
        assert dumps_in_pieces(given) + b"\n" == jsontree.dumps(given)
    other = {"wide": {"state": dict(wide, more=1)}}
    assert kept.dumps(other) == jsontree.dumps(other)
    with pytest.raises(ValueError, match="Out of range"):
        kept.dumps({"wide": {"state": {**wide, "bad": float("nan")}}})


# -- what stands before the components -------------------------------------------------------------------------------


def _wide_state(fill: float) -> dict[str, Any]:
    return {"model": {f"tensor_{number:04d}": torch.full((2,), fill) for number in range(1200)}}


def _forge(file: Path, change: Any) -> None:
    body = json.loads(file.read_bytes())
    del body["manifest_digest"]
    change(body)
    text = json.dumps(body, separators=(",", ":")).encode()
    file.write_bytes(manifests.seal(text[:-1]))


def test_a_head_says_what_the_whole_manifest_does(tmp_path: Path) -> None:
    config = {"components": {"x": 1}, "a": {"b": 2, "components": [',"components":{}']}}
    with Checkpointer(tmp_path / "run", config=config) as run:
        report = run.save(1, _wide_state(1.0), metrics={"loss": 2.0}).result()
    data = Path(report.path, "manifest.json").read_bytes()
    whole, head = manifests.decode(data, "here"), manifests.decode(data, "here", whole=False)
    assert type(head.components) is not type(whole.components), "the components were parsed after all"
    assert head == whole
    assert dict(head.components) == dict(whole.components)


def test_components_are_refused_when_they_are_looked_at(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        file = Path(run.save(1, _wide_state(1.0)).result().path, "manifest.json")
    _forge(file, lambda body: body["components"]["model"]["tensors"]["tensor_0003"].__setitem__(4, 1 << 40))
    head = manifests.decode(file.read_bytes(), "here", whole=False)
    assert head.step == 1
    with pytest.raises(ManifestInvalid, match="tensor_0003"):
        len(head.components)


def test_a_newest_with_forged_tensors_is_passed_over_and_listed_as_damaged(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as run:
        for step in (1, 2):
            report = run.save(step, _wide_state(float(step))).result()
    _forge(
        Path(report.path, "manifest.json"),
        lambda body: body["components"]["model"]["tensors"]["tensor_0003"].__setitem__(0, "F128"),
    )
    state = _wide_state(0.0)
    with pytest.warns(RuntimeWarning, match="F128"):
        assert Run(tmp_path / "run").restore(state).step == 1
    assert (state["model"]["tensor_0003"] == 1.0).all()
    assert [entry.damage is None for entry in Run(tmp_path / "run").ls()] == [True, False]


def test_retention_takes_only_what_this_run_has_published_on_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies there is parsed once, and never again; what was just published was parsed before it was."""
    with Checkpointer(tmp_path / "run") as run:
        run.save(1, _wide_state(1.0)).result()
    parsed: list[str] = []
    original = manifests.parse_components

    def parse_components(body: Any, *others: Any) -> Any:
        found = original(body, *others)
        parsed.append(body.where)
        return found

    monkeypatch.setattr(manifests, "parse_components", parse_components)
    with Checkpointer(tmp_path / "run", keep=KeepLast(5)) as run:
        run.resume(_wide_state(0.0))
        parsed.clear()
        for step in (2, 3, 4):
            run.save(step, _wide_state(float(step))).result()
    mine = [where for where in parsed if where.endswith(("step-00000002/manifest.json", "step-00000003/manifest.json"))]
    assert mine == []
    assert sum(where.endswith("step-00000001/manifest.json") for where in parsed) <= 2
