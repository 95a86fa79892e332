"""A conversion never holds what it converts: a file of 4 GB takes less than 512 MiB of anonymous memory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from support.anonymous_memory import converted

GIB = 1 << 30
SIZES = (1, 1, 1, 1)


def _sparse(path: Path, gib: tuple[int, ...]) -> None:
    """Make a safetensors file of float32 tensors of so many GiB without writing their zeros."""
    entries, at = {}, 0
    for number, size in enumerate(gib):
        shape = [size * GIB // 4 // 4096, 4096]
        entries[f"layer.{number}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size * GIB]}
        at += size * GIB
    head = json.dumps(entries).encode()
    head = head.ljust(4088)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
    os.truncate(path, 8 + len(head) + at)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_gigabytes_go_in_and_out_in_half_of_one(tmp_path: Path) -> None:
    _sparse(tmp_path / "in.safetensors", SIZES)
    used = {"import safetensors": converted("import", "safetensors", tmp_path / "in.safetensors", tmp_path / "run")}
    (tmp_path / "in.safetensors").unlink()
    ways = (
        ("safetensors", "out.safetensors"),
        ("torch", "out.pt"),
        ("gguf", "out.gguf"),
        ("Q8_0", "out.q8.gguf"),
        ("onnx", "out.onnx"),
    )
    for fmt, name in ways:
        used[f"export {fmt}"] = converted("export", fmt, tmp_path / "run", tmp_path / name)
        if fmt != "safetensors":
            back = converted("import", "gguf" if fmt == "Q8_0" else fmt, tmp_path / name, tmp_path / "back")
            used[f"import {fmt}"] = back
        for path in tmp_path.glob("out*"):
            path.unlink()
        shutil.rmtree(tmp_path / "back", ignore_errors=True)
    print({way: f"{nbytes / (1 << 20):.0f} MiB, {seconds:.1f} s" for way, (nbytes, seconds) in used.items()})
    assert max(nbytes for nbytes, _ in used.values()) < GIB // 2, used
