"""The training states of the golden corpus, and what their bits are, in words that need no code of this library.

Every value is a formula over integers (``filled``), so that a state can be built again, anywhere, without reading it.
This module uses nothing of ``asyncckpt`` but ``RngState`` and ``LocalShard``: users put these two into their states.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import random
import struct
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

if __package__:  # imported by the test
    from golden import typed, wrapped
else:
    import typed
    import wrapped

#: Every dtype that the first version could store.
DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "bool", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"),
)
#: So many bytes are enough for every codec, and several chunks of ``make.EXTENT_BYTES``.
LARGE = 68_000


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int, kinds: int = 0) -> torch.Tensor:
    """Bytes that a multiplication decides: byte n is the top byte of (n + 1) · (2 · seed + 1) · 0x9E3779B97F4A7C15,
    modulo 2 to the 64th. With ``kinds`` an element has one of so many values, as what a codec makes small. In bool,
    bytes are 0 or 1."""
    count = int(np.prod(shape, dtype=np.int64))
    size = dtype.itemsize
    places = np.arange(count, dtype=np.uint64)
    elements = (places * places // np.uint64(7)) % np.uint64(kinds) if kinds else places
    numbers = elements[:, None] * np.uint64(size) + np.arange(size, dtype=np.uint64)[None, :]
    with np.errstate(over="ignore"):
        raw = ((numbers + np.uint64(1)) * np.uint64((2 * seed + 1) * 0x9E3779B97F4A7C15 % 2**64)) >> np.uint64(56)
    data = raw.astype(np.uint8).reshape(-1)
    if dtype is torch.bool:
        return torch.from_numpy(data % 2 == 1).reshape(shape)
    return torch.from_numpy(data).view(dtype).reshape(shape)


def numbers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Floats that can be trained with: multiples of 1/256 between -1 and 1."""
    return (filled(shape, torch.uint8, seed).float() - 128) / 128


class Net(nn.Module):
    """An embedding that is tied to the head, a layer with buffers, a frozen layer and one of bfloat16."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 24)
        self.norm = nn.BatchNorm1d(24)
        self.frozen = nn.Linear(24, 24).requires_grad_(False)
        self.half = nn.Linear(24, 11, dtype=torch.bfloat16)
        self.head = nn.Linear(24, 13, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            for number, (_, value) in enumerate(self.state_dict().items()):
                value.copy_(numbers(tuple(value.shape), seed + number) * (100 if value.dtype is torch.int64 else 1))
            self.head.weight.copy_(numbers((13, 24), seed))


class Plain(nn.Module):
    """Layers that FSDP2 can divide, none of them evenly."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first = nn.Linear(37, 53)
        self.norm = nn.LayerNorm(53)
        self.last = nn.Linear(53, 3)
        with torch.no_grad():
            for number, (_, value) in enumerate(self.state_dict().items()):
                value.copy_(numbers(tuple(value.shape), seed + number))


class Kept:
    """A stateful object that holds any value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]


class Generators:
    """Stands for the generators of the process, which ``asyncckpt.RngState`` saves and restores."""

    def __init__(self, seed: int) -> None:
        import asyncckpt

        self._saved = asyncckpt.RngState()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        return self._saved.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._saved.load_state_dict(state)


def optimizer_of(model: nn.Module, seed: int) -> torch.optim.Optimizer:
    """AdamW after one step, two groups, with state that is a formula of the parameters' places."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained[:1], "lr": 0.1 + seed}, {"params": trained[1:], "betas": (0.5, 0.75), "lr": 0.25}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.125)
    before = [parameter.detach().clone() for parameter in trained]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(trained, before, strict=True):
            parameter.copy_(value)
            optimizer.state[parameter]["exp_avg"].copy_(value * 0.5 + seed)
            optimizer.state[parameter]["exp_avg_sq"].copy_(value * value)
    optimizer.zero_grad()
    return optimizer


def every_dtype(seed: int) -> dict[str, torch.Tensor]:
    """Any bits, NaNs with payloads among them, in each dtype and in shapes that are easily got wrong."""
    found = {name: filled((3, 5), getattr(torch, name), seed + at) for at, name in enumerate(DTYPES)}
    return {
        **found,
        "none": torch.empty(0, 3),
        "one": filled((), torch.float32, seed),
        "row": filled((1, 9), torch.int16, 3),
    }


def large(seed: int) -> dict[str, torch.Tensor]:
    """What codecs encode: some chunks each, of few values."""
    return {
        "floats": filled((LARGE // 4,), torch.float32, seed, 40),
        "halves": filled((2, LARGE // 4), torch.bfloat16, seed + 1, 40),
        "tiny": filled((7,), torch.float32, seed + 3),
    }


def plain_values(seed: int) -> Any:
    """Every kind of plain value that ``state.json`` has a tag for."""
    return {
        "numbers": [seed, -1, 2**64, 3**2000, 0.1, -0.0, float("inf"), 1 + 2j, True, None],
        "nan": struct.unpack(">d", bytes.fromhex("7ff8000000000abc"))[0],
        "text": ["", "ä€𝄞", "\ud834\udd1e", "\udc80"],
        "bytes": [b"\x00\xff", bytearray(b"abc")],
        "containers": [(1, (2,)), {3, 4}, frozenset({5}), deque([1, 2], maxlen=4), {6: "six", (7, 8): None}],
        "more": [OrderedDict(b=1, a=2), Counter("aab"), defaultdict(list, {"k": [1]})],
        "torch": [torch.bfloat16, torch.Size((2, 3)), torch.device("cpu")],
        "spaces": [Namespace(a=1), SimpleNamespace(b=[2])],
        "numpy": [np.float32(0.1), np.int8(-3), np.arange(6, dtype=np.int16).reshape(2, 3), np.array([True, False])],
        "tensors": [filled((4,), torch.float32, seed), {"deep": filled((2, 2), torch.int32, seed + 1)}],
    }


# -- states, by name ---------------------------------------------------------------------------------------------------


def _whole(seed: int, rank: int, size: int) -> dict[str, Any]:
    model = Net(seed)
    return {
        "model": model,
        "optimizer": optimizer_of(model, seed),
        "zoo": every_dtype(seed),
        "loader": Kept({"position": 1000 + seed, "order": [3, 1, 2]}),
        "rng": Generators(seed),
    }


def _values(seed: int, rank: int, size: int) -> dict[str, Any]:
    return {"values": Kept(plain_values(seed)), "tensor": {"w": numbers((5, 3), seed)}, "epoch": {"n": seed}}


def _typed(seed: int, rank: int, size: int) -> dict[str, Any]:
    """Every kind of value that version 4 has a tag for."""
    both = typed.values(seed, numbers((3,), seed), numbers((2,), seed + 1))
    return {"values": Kept(both), "plain": {"progress": typed.progress(seed, None)}}


def _wrapped(seed: int, rank: int, size: int) -> dict[str, Any]:
    """Tensors of subclasses, one and two levels deep, and objects in an optimizer's state."""

    def packed(at: int) -> wrapped.Packed:
        return wrapped.packed(filled((5, 3), torch.uint8, seed + at), numbers((5,), seed + at))

    model = wrapped.Quantised(packed(0), numbers((5, 3), seed + 1))
    optimizer = wrapped.Keeping([model.trained], lr=0.25)
    optimizer.state[model.trained] = {
        "moment": packed(2),
        "pair": wrapped.Pair.of(("both", 2), packed(3), numbers((2, 2), seed + 4)),
        "meter": wrapped.Meter(seed, (seed / 7, 0.5)),
        "phase": wrapped.Phase.MAIN if seed < 50 else wrapped.Phase.WARM,
        "gauge": wrapped.Gauge(seed / 3),
    }
    return {"model": model, "optimizer": optimizer}


def _large(seed: int, rank: int, size: int) -> dict[str, Any]:
    counts = filled((LARGE // 8,), torch.int64, seed + 2, 9)
    return {"weights": {**large(seed), "counts": counts}, "zoo": every_dtype(seed), "loader": Kept({"position": seed})}


def _one(seed: int, rank: int, size: int) -> dict[str, Any]:
    return {"weights": {"halves": filled((LARGE // 2,), torch.bfloat16, seed, 40)}, "epoch": {"n": seed}}


def _middle(seed: int, rank: int, size: int) -> dict[str, Any]:
    """A tensor that is cut where ``extent_bytes`` is small."""
    return {"weights": {"grid": filled((90, 70), torch.float32, seed, 30)}, "zoo": every_dtype(seed)}


def _moving(seed: int, rank: int, size: int) -> dict[str, Any]:
    """From seed to seed some elements change a little, and one tensor is new every time."""
    weights = large(0)
    weights["floats"].view(torch.int32)[seed::11] ^= seed
    weights["halves"].view(torch.int16)[:, seed::17] ^= 3 * seed
    return {"weights": {**weights, "tiny": numbers((7,), seed)}, "loader": Kept(seed)}


def _ranks(seed: int, rank: int, size: int) -> dict[str, Any]:
    """Of ``size`` ranks: a model that all hold, rows of a table that each has some of, and what is each rank's own."""
    import asyncckpt

    # ``make.py`` runs this with the code of each format's day, too, which called it Shard
    local_shard = getattr(asyncckpt, "LocalShard", None) or asyncckpt.Shard
    model = Net(seed)
    table = filled((50, 60), torch.float32, seed, 30)
    begin, end = (0, 50) if size == 1 else ((0, 19) if rank == 0 else (19, 50))
    rows = table[begin:end].clone()
    part = rows if size == 1 else local_shard(rows, (50, 60), (begin, 0))
    return {
        "model": model,
        "optimizer": optimizer_of(model, seed),
        "table": {"rows": part},
        "loader": Kept({"position": 1000 + rank, "order": list(range(rank, 5))}),
        "rng": Generators(seed + rank),
    }


def _fsdp(seed: int, rank: int, size: int) -> dict[str, Any]:
    """Of several ranks: a model whose rows FSDP2 divides, with its optimizer, and what is each rank's own."""
    model = Plain(seed)
    optimizer = optimizer_of(model, seed)
    if size > 1:
        from torch.distributed.fsdp import fully_shard

        model = Plain(seed)
        fully_shard(model)
        optimizer = optimizer_of(model, seed)
    return {
        "model": model,
        "optimizer": optimizer,
        "loader": Kept({"position": 1000 + rank}),
        "rng": Generators(seed + rank),
    }


STATES: dict[str, Callable[[int, int, int], dict[str, Any]]] = {
    "whole": _whole,
    "values": _values,
    "typed": _typed,
    "wrapped": _wrapped,
    "large": _large,
    "one": _one,
    "middle": _middle,
    "moving": _moving,
    "ranks": _ranks,
    "fsdp": _fsdp,
}


def build(name: str, seed: int, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """The state as ``rank`` of ``size`` holds it; of ``size`` 1 all of it, with what is rank 0's own."""
    return STATES[name](seed, rank, size)


# -- bits, in words ----------------------------------------------------------------------------------------------------


def contents(state: Mapping[str, Any]) -> dict[str, str]:
    """What every part of a live state is, exactly: ``{path: text}``. Collective where there are DTensors."""
    found: dict[str, str] = {}
    for name, component in state.items():
        if isinstance(component, Generators):
            text = described([random.getstate(), np.random.get_state(), torch.get_rng_state()])
            found[name] = f"generators {_sha(text.encode())}"
            continue
        value = component.value if isinstance(component, Kept) else component
        if isinstance(value, nn.Module | torch.optim.Optimizer):
            value = value.state_dict()
        _flatten(value, name, found)
    return found


def _flatten(value: Any, path: str, found: dict[str, str]) -> None:
    if isinstance(value, dict) and value and all(type(key) in (str, int) for key in value):
        for key, item in value.items():
            _flatten(item, f"{path}.{key}", found)
    else:
        found[path] = described(value)


def described(value: Any) -> str:
    """A text that is equal for equal bits and types: tensors and arrays by dtype, shape and SHA-256 of their row-major,
    little-endian bytes."""
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    if hasattr(type(value), "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        inside = {name: getattr(value, name) for name in names}
        return f"{type(value).__name__} of {described(context)} {described(inside)}"
    if isinstance(value, torch.Tensor):
        dense = value.detach().cpu().contiguous()
        data = dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} {_sha(data)}"
    if hasattr(value, "global_shape"):
        return f"rows {described(value.tensor)}"
    if isinstance(value, np.ndarray):
        return f"numpy {value.dtype.str} {list(value.shape)} {_sha(value.tobytes())}"
    if isinstance(value, np.generic):
        return f"numpy {value.dtype.str} {value.tobytes().hex()}"
    kind = type(value).__name__
    if isinstance(value, float):
        return f"{kind} {struct.pack('>d', value).hex()}"
    if isinstance(value, complex):
        return f"{kind} {struct.pack('>dd', value.real, value.imag).hex()}"
    if isinstance(value, str):
        return f"{kind} {value!a}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{kind} {value:x}"
    if isinstance(value, dict):
        head = f"{kind} of {value.default_factory}" if isinstance(value, defaultdict) else kind
        return f"{head} {{{', '.join(f'{described(key)}: {described(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple | deque):
        head = f"{kind} of {value.maxlen}" if isinstance(value, deque) else kind
        return f"{head} [{', '.join(described(item) for item in value)}]"
    if isinstance(value, set | frozenset):
        return f"{kind} [{', '.join(sorted(described(item) for item in value))}]"
    if isinstance(value, Namespace | SimpleNamespace):
        return f"{kind} {described(vars(value))}"
    if isinstance(value, io.BytesIO):
        return f"{kind} at {value.tell()} {value.getvalue().hex()}"
    if dataclasses.is_dataclass(value):
        return f"{kind} {described(vars(value))}"
    return f"{kind} {value!r}"


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def named_tensors(name: str, seed: int) -> dict[str, str]:
    """What ``load_tensors`` has to find in a checkpoint of this state, by qualified name, DTensors and shards whole."""
    found: dict[str, str] = {}
    state = build(name, seed)
    for component, value in state.items():
        if isinstance(value, nn.Module):
            for key, item in value.state_dict().items():
                found |= _inside(f"{component}.{key}", item)
        elif isinstance(value, torch.optim.Optimizer):
            names = {parameter: key for key, parameter in state["model"].named_parameters()}
            for parameter, items in value.state.items():
                for key, item in items.items():
                    if isinstance(item, torch.Tensor):
                        found |= _inside(f"{component}.state.{names[parameter]}.{key}", item)
        elif isinstance(value, dict):
            found |= {
                f"{component}.{key}": described(item) for key, item in value.items() if isinstance(item, torch.Tensor)
            }
    return found


def _inside(name: str, value: torch.Tensor) -> dict[str, str]:
    """The tensors that are stored of one: itself, or those that it wraps."""
    if not hasattr(type(value), "__tensor_flatten__") or hasattr(value, "full_tensor"):
        return {name: described(value)}
    parts = [_inside(f"{name}.{part}", getattr(value, part)) for part in value.__tensor_flatten__()[0]]
    return {key: text for part in parts for key, text in part.items()}
