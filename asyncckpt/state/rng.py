"""``RngState`` stores every random number generator that a training loop draws from, as one component."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from asyncckpt.errors import InvalidOption

Generator = random.Random | np.random.Generator | torch.Generator


class RngState:
    """Captures and restores the global generators of Python, NumPy, torch's CPU and every CUDA device.

    ``RngState(generators={"data": rng})`` adds generators of your own: a ``random.Random``, ``numpy.random.Generator``
    or ``torch.Generator`` under each name. Raises ``InvalidOption`` for anything else. Their state is taken on the
    thread that calls ``save``; to read a CUDA generator synchronises with nothing. In a job each rank stores its own.
    Not thread-safe: nothing should draw from a generator while it is captured or restored.
    """

    def __init__(self, generators: Mapping[str, Generator] | None = None) -> None:
        self.generators = dict(generators or {})
        for name, generator in self.generators.items():
            if not isinstance(generator, Generator):
                raise InvalidOption(f"RngState: generator {name!r} is a {type(generator).__name__}, not a generator")

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every generator as plain values, so that this component needs no shard. CUDA's are left
        out in a process that has not used CUDA yet."""
        state: dict[str, Any] = {
            "python": _python_state(random._inst),
            "numpy": _numpy_legacy_state(),
            "torch": _tensor_bytes(torch.get_rng_state()),
            "generators": {name: _get(generator) for name, generator in self.generators.items()},
        }
        initialized: Callable[[], bool] = torch.cuda.is_initialized
        if torch.cuda.is_available() and initialized():
            state["cuda"] = [_tensor_bytes(one) for one in torch.cuda.get_rng_state_all()]
        return state

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Restore every generator from ``state``, which ``state_dict`` has made. States of more CUDA devices than this
        machine has are ignored. Raises ``InvalidOption`` where ``state`` lacks a generator of your own; those before
        it are restored then."""
        _set(random._inst, state["python"])
        legacy = state["numpy"]
        keys = np.frombuffer(legacy["keys"], dtype=np.uint32)
        np.random.set_state((legacy["name"], keys, legacy["position"], legacy["has_gauss"], legacy["gauss"]))
        torch.set_rng_state(_bytes_tensor(state["torch"]))
        for name, generator in self.generators.items():
            if name not in state["generators"]:
                raise InvalidOption(f"RngState: the checkpoint holds no generator {name!r}; leave it out to load")
            _set(generator, state["generators"][name])
        if "cuda" in state and torch.cuda.is_available():
            for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(_bytes_tensor(saved), device)


def _get(generator: Generator) -> Any:
    if isinstance(generator, random.Random):
        return _python_state(generator)
    if isinstance(generator, np.random.Generator):
        return dict(generator.bit_generator.state)
    return _tensor_bytes(generator.get_state())


def _set(generator: Generator, state: Any) -> None:
    if isinstance(generator, random.Random):
        words = struct.unpack(f"<{len(state['words']) // 4}I", state["words"])
        generator.setstate((state["version"], words, state["gauss"]))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(_bytes_tensor(state))


def _python_state(generator: random.Random) -> dict[str, Any]:
    version, words, gauss = generator.getstate()
    return {"version": version, "words": struct.pack(f"<{len(words)}I", *words), "gauss": gauss}


def _numpy_legacy_state() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "name": str(name),
        "keys": np.asarray(keys, dtype=np.uint32).tobytes(),
        "position": int(position),
        "has_gauss": int(has_gauss),
        "gauss": float(gauss),
    }


def _tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
