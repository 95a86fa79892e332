"""States that hypothesis draws: of several dtypes, some of their tensors in memory otherwise than they are stored."""

from __future__ import annotations

import torch
from hypothesis import strategies as st


def drawn_state(draw: st.DataObject) -> dict[str, torch.Tensor]:
    dtypes = [torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.complex64]
    state: dict[str, torch.Tensor] = {}
    for n in range(draw.draw(st.integers(1, 12))):
        rows, columns = draw.draw(st.integers(0, 700)), draw.draw(st.integers(1, 700))
        tensor = torch.randint(-100, 100, (rows, columns)).to(draw.draw(st.sampled_from(dtypes)))
        kind = draw.draw(st.sampled_from(["plain", "transposed", "cut", "conjugated", "imaginary"]))
        if kind == "transposed":
            tensor = tensor.t()
        elif kind == "cut":
            tensor = tensor[:, ::2]
        elif kind == "conjugated":
            tensor = tensor.to(torch.complex64).conj()
        elif kind == "imaginary":
            tensor = (tensor.to(torch.complex64) * 1j).conj().imag
        state[f"t{n:02}"] = tensor
    return state
