"""``RngState`` stores every random number generator that a training loop draws from, as one component."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from asyncckpt.errors import InvalidOption
from asyncckpt.state.dtensor import job_size

Generator = random.Random | np.random.Generator | torch.Generator


class RngState:
    """Captures and restores the global generators of Python, NumPy, torch's CPU and CUDA devices.

    ``RngState(generators={"data": rng})`` adds generators of your own: a ``random.Random``, ``numpy.random.Generator``
    or ``torch.Generator`` under each name. Raises ``InvalidOption`` for anything else. Their state is taken on the
    thread that calls ``save``; to read a CUDA generator synchronises with nothing. Not thread-safe: nothing should draw
    from a generator while it is captured or restored.

    In a job each rank stores its own, of CUDA's that of its current device, whatever that is called when it comes back;
    other devices that a rank draws on go into ``generators``. A rank that the checkpoint has no state of, because fewer
    ranks saved, gets streams that follow from those of rank 0 and from its number: no two ranks draw the same, and a
    job that is restored again draws the same again. A generator that was in the same state on all of several ranks
    belongs to all, and is taken over as it is.
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
            here = torch.cuda.current_device()
            state["cuda"] = {"current": _tensor_bytes(torch.cuda.get_rng_state(here))}
            if job_size() == 1:
                state["cuda"] |= {"device": here, "all": [_tensor_bytes(s) for s in torch.cuda.get_rng_state_all()]}
        return state

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Restore every generator from ``state``, which ``state_dict`` has made. States of more CUDA devices than this
        machine has are ignored. Raises ``InvalidOption``, and restores none, where ``state`` lacks a generator of your
        own."""
        lacking = self.lacking(state, "RngState")
        if lacking:
            raise InvalidOption(f"the checkpoint holds no {', '.join(lacking)}; leave it out to load")
        _set(random._inst, state["python"])
        legacy = state["numpy"]
        keys = np.frombuffer(legacy["keys"], dtype=np.uint32)
        np.random.set_state((legacy["name"], keys, legacy["position"], legacy["has_gauss"], legacy["gauss"]))
        torch.set_rng_state(_bytes_tensor(state["torch"]))
        for name, generator in self.generators.items():
            _set(generator, state["generators"][name])
        if "cuda" in state and torch.cuda.is_available():
            _set_cuda(state["cuda"])

    def lacking(self, state: Any, where: str) -> list[str]:
        """Return the names of the generators of your own that ``state`` does not have, each after ``where``."""
        there = state.get("generators") if isinstance(state, Mapping) else None
        known = there if isinstance(there, Mapping) else {}
        return [f"{where}.generators.{name}" for name in self.generators if name not in known]

    def load_derived(self, states: Sequence[Mapping[str, Any]], rank: int) -> None:
        """Set every generator on a rank that none of ``states`` is of: those of all ranks that saved. Each one gets a
        stream that follows from rank 0's state of it and from ``rank``, or the state that all of several ranks had."""

        def seed(*path: str) -> int | None:
            saved = [repr(_at(state, path)) for state in states]
            known = _at(states[0], path) is not None
            if len(saved) > 1 and known and len(set(saved)) == 1:
                return None
            source = saved[0] if known else repr(states[0]["torch"])
            digest = hashlib.sha256(json.dumps([rank, *path, source]).encode()).digest()
            return int.from_bytes(digest[:8], "little")

        shared = dict(states[0])
        derived = {name: seed("generators", name) for name in self.generators}
        shared["generators"] = {
            name: states[0]["generators"][name] if value is None else _get(_seeded(self.generators[name], value))
            for name, value in derived.items()
        }
        seeds = {name: seed(name) for name in ("python", "numpy", "torch", "cuda")}
        if seeds["cuda"] is not None:
            shared.pop("cuda", None)
        self.load_state_dict(shared)
        if seeds["python"] is not None:
            random.seed(seeds["python"])
        if seeds["numpy"] is not None:
            np.random.seed(np.frombuffer(seeds["numpy"].to_bytes(8, "little"), dtype=np.uint32))
        if seeds["torch"] is not None:
            torch.default_generator.manual_seed(seeds["torch"])
        if seeds["cuda"] is not None:
            torch.cuda.manual_seed(seeds["cuda"])  # of the current device; later, where CUDA is not in use yet


def _at(state: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        state = state.get(key) if isinstance(state, Mapping) else None
    return state


def _seeded(generator: Generator, seed: int) -> Generator:
    """Seed a generator, and return it."""
    if isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.Generator):
        kind: Any = type(generator.bit_generator)
        generator.bit_generator.state = kind(seed).state
    else:
        generator.manual_seed(seed)
    return generator


def _set_cuda(saved: Any) -> None:
    """Set the generators of CUDA devices. The one of the device that the saved rank used goes to the current device;
    the others keep their numbers."""
    count = torch.cuda.device_count()
    if isinstance(saved, Mapping):
        here, there = torch.cuda.current_device(), saved.get("device")
        states = list(saved.get("all", ())) if job_size() == 1 else []
        for device, state in enumerate(states[:count]):
            if device not in (here, there):
                torch.cuda.set_rng_state(_bytes_tensor(state), device)
        if there is not None and there != here and there < count and here < len(states):
            torch.cuda.set_rng_state(_bytes_tensor(states[here]), there)
        torch.cuda.set_rng_state(_bytes_tensor(saved["current"]), here)
    else:  # a checkpoint of an older version lists all devices
        for device, state in enumerate(saved[:count]):
            torch.cuda.set_rng_state(_bytes_tensor(state), device)


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
