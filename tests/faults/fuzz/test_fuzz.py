"""Fuzzers of every parser of untrusted bytes: nothing but this library's errors may come out of any of them.

The default suite runs each on its seeds, on attacks and on some hundred mutations. ``pytest -m slow`` runs each in a
process of its own under atheris, for ``FUZZ_SECONDS`` (30) or until ``FUZZ_RUNS`` executions, whichever is first.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples, some

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import fuzz_engine  # noqa: E402
from fuzz_parsers import PARSERS, small_body  # noqa: E402

#: A quarter of them in the fast suite: some tenths of a second each.
EXECUTIONS = {"views": 1500, "restore": 300, "checkpoint": 600, "codecs": 20_000, "zarr-index": 20_000}
SECONDS = float(os.environ.get("FUZZ_SECONDS", "30"))
RUNS = int(os.environ.get("FUZZ_RUNS", "10000000"))


@pytest.mark.parametrize("name", PARSERS)
def test_nothing_but_typed_errors_comes_out(name: str) -> None:
    parser = PARSERS[name]
    outcomes = {parser.execute(seed) for seed in parser.seeds()}
    assert None in outcomes, "no seed is good: the fuzzer would only meet the first check"
    rng = random.Random(name)
    corpus = list(parser.seeds())
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(some(EXECUTIONS.get(name, 4000))):
            refused += parser.execute(parser.mutated(rng.choice(corpus), rng)) is not None
    assert refused > 20, "the mutations meet no check at all"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.just("$"), inner, max_size=4),
    max_leaves=12,
)


@examples(300)
@given(value=json_values, data=st.data())
def test_any_json_anywhere_in_a_manifest_is_taken_or_refused(value: Any, data: st.DataObject) -> None:
    tree = json.loads(small_body() + b"}")
    node: Any = tree
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = value
    PARSERS["manifest"].execute(json.dumps(tree).encode())


@examples(300)
@given(value=json_values)
def test_any_json_is_a_state_or_is_refused(value: Any) -> None:
    PARSERS["state"].execute(json.dumps(value).encode())


@examples(200)
@given(value=json_values, tag=st.sampled_from(["dict", "set", "deque", "ndarray", "numpy", "Size", "device", "int"]))
def test_any_json_under_any_tag_is_a_state_or_is_refused(value: Any, tag: str) -> None:
    tree = {"$": tag, "v": value}
    tree |= {"ndarray": {"dtype": "<f4", "shape": [1]}, "numpy": {"dtype": "<f4"}, "deque": {"maxlen": None}}.get(
        tag, {}
    )
    PARSERS["state"].execute(json.dumps(tree).encode())


@examples(300)
@given(
    data=st.binary(max_size=200), name=st.sampled_from(["safetensors", "codecs", "zarr-json", "zarr-index", "lease"])
)
def test_any_bytes_are_read_or_refused(data: bytes, name: str) -> None:
    PARSERS[name].execute(data)


def test_the_harness_sees_an_untyped_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a fuzzer that finds nothing is worth: a planted bug is found within a few thousand executions."""
    from asyncckpt.manifest import parse as manifest_rows

    monkeypatch.setattr(manifest_rows, "is_number", lambda value: type(value) in (int, float))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OverflowError):
        fuzz_engine.plain_run(PARSERS["manifest"], 60, 10**6, 1)
    assert (tmp_path / "finding-manifest").exists()


def test_the_engine_reports_executions_and_memory() -> None:
    done = _run("zarr-index", "--unguided", "--seconds", "2", "--runs", "2000")
    assert done["executions"] == 2000
    assert done["grown_mib"] <= fuzz_engine.MEMORY_ALLOWANCE_MIB


@pytest.mark.slow
@pytest.mark.timeout(100_000)
@pytest.mark.parametrize("name", PARSERS)
def test_the_guided_fuzzer_finds_nothing(name: str) -> None:
    began = time.monotonic()
    done = _run(name, "--seconds", str(SECONDS), "--runs", str(RUNS // PARSERS[name].weight))
    print(json.dumps(done))
    assert done["executions"] > 0
    assert done["grown_mib"] <= fuzz_engine.MEMORY_ALLOWANCE_MIB
    assert time.monotonic() - began < SECONDS * 2 + 120


def _run(*arguments: str) -> Any:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(HERE / "fuzz_engine.py"), *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
