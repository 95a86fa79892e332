"""Triton's kernel copies every byte of every row to its place, and no other. Where there is no GPU, Triton's own
interpreter runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="comes with CUDA builds of torch")

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, torch
from asyncckpt.stage.triton_gather import PointerTable

device = sys.argv[1]
generator = torch.Generator().manual_seed(3)
sizes = [16, 4096, 4097, 1, 64, 10_000, 5, 12_288, 0, 8192, 4080]
whole = [torch.randint(0, 256, (size + 32,), dtype=torch.uint8, generator=generator).to(device) for size in sizes]
# of some, the first byte is not where a word could begin; of some, the place is not
rows, end = [], 0
for number, (tensor, size) in enumerate(zip(whole, sizes)):
    source = tensor[number % 3 : number % 3 + size]
    place = end + (7 if number % 4 == 1 else 0)
    rows.append((source, place))
    end = -(-(place + size) // 64) * 64 + 64
image = torch.full((end,), 0xA5, dtype=torch.uint8, device=device)
expected = image.clone()
addresses = [source.data_ptr() for source, _ in rows]
table = PointerTable(image, addresses, [place for _, place in rows], sizes)
for turn in range(2):
    table.launch()
    for source, place in rows:
        expected[place : place + len(source)] = source
    assert torch.equal(image, expected), turn
    for tensor in whole:
        tensor.add_(1)
PointerTable(image, [], [], []).launch()
"""


def _run(device: str, **more: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | more
    command = [sys.executable, "-c", SCRIPT, device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr


def test_the_kernel_copies_what_it_is_told_by_the_interpreter() -> None:
    _run("cpu", TRITON_INTERPRET="1")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_copies_what_it_is_told_on_a_gpu() -> None:
    _run("cuda")
