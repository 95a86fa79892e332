"""Large models are described here by their tensors alone, and by which rank holds which rows of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from asyncckpt.plan.partition import RankHolding
from asyncckpt.types import RowOwners, TensorSpec
from benchmarks.suites.ranks.simulation import dealt, holding, spec_of

#: A name, and the shape of what has it.
Shapes = list[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is simulated: its tensors, and how many ranks deal the rows of each out among themselves. ``experts``:
    an expert's tensors are those of one of so many groups of ranks. ``copies``: each part lies on so many ranks."""

    name: str
    shapes: Callable[[], Shapes]
    ranks: int
    experts: int = 1
    copies: int = 1


def llama(layers: int, hidden: int, inner: int, vocabulary: int) -> Shapes:
    """Return the shapes of a model of the llama family, with grouped keys of 1,024 columns."""
    found: Shapes = [("embed", (vocabulary, hidden)), ("norm", (hidden,)), ("head", (vocabulary, hidden))]
    block: Shapes = [
        ("q", (hidden, hidden)),
        ("k", (1024, hidden)),
        ("v", (1024, hidden)),
        ("o", (hidden, hidden)),
        ("gate", (inner, hidden)),
        ("up", (inner, hidden)),
        ("down", (hidden, inner)),
        ("norm1", (hidden,)),
        ("norm2", (hidden,)),
    ]
    return found + [(f"layers.{layer}.{name}", shape) for layer in range(layers) for name, shape in block]


def mixture(layers: int, hidden: int, inner: int, experts: int) -> Shapes:
    """Return the shapes of a mixture of experts."""
    found: Shapes = [("embed", (129_280, hidden)), ("head", (129_280, hidden))]
    for layer in range(layers):
        found += [(f"layers.{layer}.{name}", (hidden, hidden)) for name in ("q", "o")]
        found += [(f"layers.{layer}.{name}", (1024, hidden)) for name in ("k", "v")]
        found += [(f"layers.{layer}.{name}", (hidden,)) for name in ("norm1", "norm2")]
        for expert in range(experts):
            name = f"layers.{layer}.experts.{expert}"
            found += [
                (f"{name}.gate", (inner, hidden)),
                (f"{name}.up", (inner, hidden)),
                (f"{name}.down", (hidden, inner)),
            ]
    return found


JOBS = (
    Job("70B, FSDP over 64", lambda: llama(80, 8192, 28_672, 128_256), 64),
    Job("70B, FSDP over 1,024", lambda: llama(80, 8192, 28_672, 128_256), 1024),
    Job("405B, FSDP over 4,096", lambda: llama(126, 16_384, 53_248, 128_256), 4096),
    Job("1T of experts on 16,384", lambda: mixture(61, 7168, 2048, 160), 16_384, 160),
)
#: Jobs whose tensors lie on several ranks each.
HYBRID = (
    Job("405B, HSDP 64 x 64", lambda: llama(126, 16_384, 53_248, 128_256), 4096, copies=64),
    Job("405B, HSDP 512 x 8", lambda: llama(126, 16_384, 53_248, 128_256), 4096, copies=8),
    Job("1T of experts on 16,384, HSDP 256", lambda: mixture(61, 7168, 2048, 128), 16_384, 128, copies=16),
)


def components(shapes: Shapes) -> tuple[tuple[str, tuple[TensorSpec, ...]], ...]:
    """Return the specs of a model and of its AdamW, as a layout takes them."""
    model = tuple(spec_of(name, shape) for name, shape in shapes)
    kinds = ("step", "exp_avg", "exp_avg_sq")
    optimizer = [spec_of(f"state.{name}.{k}", shape if k != "step" else ()) for name, shape in shapes for k in kinds]
    return ("model", model), ("optimizer", tuple(optimizer))


def holdings(job: Job, specs: list[TensorSpec], rank: int) -> list[RankHolding]:
    """Return what a rank of the job holds of each tensor."""
    whole: dict[int, RowOwners] = {}
    parts: dict[tuple[int, int], RowOwners] = {}
    found: list[RankHolding] = []
    each = job.ranks // job.experts
    copies = job.copies
    for number, spec in enumerate(specs):
        count = spec.shape[0] if spec.shape else 1
        if ".experts." not in spec.name:
            rows = whole.setdefault(count, whole.get(count) or dealt(count, job.ranks // copies, copies))
        else:
            expert = int(spec.name.split(".experts.")[1].split(".")[0])
            known = parts.get((count, expert))
            if known is None:
                here = dealt(count, max(1, each // copies), min(each, copies))
                moved = tuple(tuple(one + expert * each for one in held) for held in here.holders)
                known = parts[count, expert] = RowOwners(here.bounds, moved)
            rows = known
        found.append(holding(spec, rows, number, rank))
    return found
