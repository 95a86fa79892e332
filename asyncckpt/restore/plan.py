"""A plan says what of a checkpoint goes where in the live state, before anything is touched."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from asyncckpt import jsontree
from asyncckpt.errors import AsyncCkptError, CheckpointDamaged, InvalidOption, NotEnoughMemory, StateMismatch
from asyncckpt.manifest.records import ComponentRecord, StoredTensor
from asyncckpt.read.scatter import Window
from asyncckpt.restore.live_memory import refusal
from asyncckpt.state.dtensor import is_distributed, is_sharded_tensor, receiver
from asyncckpt.state.dtypes import DTYPES
from asyncckpt.state.wrappers import hides_values
from asyncckpt.types import JsonValue

log = logging.getLogger("asyncckpt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Holds what the caller of ``restore`` chose. ``device``: where tensors that do not live yet are made. ``dtype``:
    the floating dtype that takes any other. ``selected``: whether a qualified name is to be restored. ``saved_ranks``:
    how many ranks wrote the checkpoint."""

    device: torch.device
    dtype: torch.dtype | None
    selected: Callable[[str], bool]
    saved_ranks: int = 1


@dataclass(slots=True, eq=False)
class LiveTarget:
    """A live tensor takes the values of a stored one. ``where``: its qualified name. ``also``: the names of others in
    the very same memory, which take the same values."""

    record: StoredTensor
    window: Window
    where: str
    also: Sequence[str] = ()


@dataclass(slots=True)
class RestorePlan:
    """Says what is read where, in the order in which it is done. ``read``: each stored tensor with the new memory that
    takes its values. ``checks``: what looks at those, and refuses them by ``StateMismatch``. Up to here nothing of the
    live state has changed. ``fill``: the live tensors that are filled. ``place``: what puts into live tensors what was
    read elsewhere. ``collect``: what needs the other ranks. ``finish``: what hands over the rest.

    ``used``: the keys that a tree has referred to, each at most once. ``missing``, ``unexpected``, ``mismatched``: how
    the checkpoint does not fit the live state, and ``notes`` explain it."""

    read: list[tuple[StoredTensor, list[Window]]] = field(default_factory=list)
    checks: list[Callable[[], None]] = field(default_factory=list)
    fill: list[LiveTarget] = field(default_factory=list)
    place: list[Callable[[], None]] = field(default_factory=list)
    collect: list[Callable[[], None]] = field(default_factory=list)
    finish: list[Callable[[], None]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, record: StoredTensor, value: Any, where: str, *, new: bool = False) -> None:
        """Have ``value`` take the stored tensor, or this rank's part of it where ranks hold it together. ``where``: its
        qualified name. ``new``: it is not part of the live state yet."""
        if not is_distributed(value) and not is_sharded_tensor(value):
            window = Window(value)
        else:
            part = receiver(value, where)
            window = Window(part.tensor, part.first)
            if part.finish is not None:
                self.collect.append(part.finish)
                new = True  # the rows that are redistributed afterwards
        if new:
            self.read.append((record, [window]))
        else:
            self.fill.append(LiveTarget(record, window, where))

    def merge(self, other: RestorePlan) -> None:
        """Add all of another plan, but for ``used``."""
        self.read += other.read
        self.checks += other.checks
        self.fill += other.fill
        self.place += other.place
        self.collect += other.collect
        self.finish += other.finish
        self.missing += other.missing
        self.unexpected += other.unexpected
        self.mismatched += other.mismatched
        self.notes += other.notes


#: Stored tensors by their qualified live names (``model.wte.weight``): what ``rename`` maps the stored names to.
StoredTensors = Mapping[str, StoredTensor]


def decode(
    component: str, tree: JsonValue, stored: StoredTensors, plan: RestorePlan, opts: Options, live: Any = None
) -> Any:
    """Decode a tree, with new tensors that ``plan`` fills. NumPy arrays lie in host memory, whatever the device is.
    ``live`` is the live value, whose types the decoded one gets (see ``decode_like``)."""
    tensors = new_tensors(component, stored, plan, opts)
    return decode_like(component, tree, live, tensors, on_host(component, stored, plan), plan)


def decode_like(
    component: str,
    tree: JsonValue,
    live: Any,
    tensors: Callable[[str], torch.Tensor],
    arrays: Callable[[str], torch.Tensor],
    plan: RestorePlan,
    objects: Callable[[Any, str, Any], Any] | None = None,
    wrappers: Callable[[jsontree.Wrapper, Any, str], Any] | None = None,
) -> Any:
    """Decode a tree into values of the types that live at their places. ``plan`` is told which live types do not take
    what was stored; values of whose kind nothing lives become plain data, which a warning tells. ``objects`` makes the
    objects that were stored by their state, and ``wrappers`` the tensors of wrapping subclasses, as ``jsontree.decode``
    says."""
    like = jsontree.Live(live)
    found = jsontree.decode(tree, tensors, arrays, like, objects, wrappers)
    plan.mismatched += [f"{component}{problem}" for problem in like.mismatched]
    if like.untyped:
        some = ", ".join(f"{component}{where}" for where in like.untyped[:5])
        log.warning(
            "%d values are plain data (dicts, tuples, numbers, text) where an enum, a dataclass or the like was saved: "
            "no live value of the kind is at their place, which alone could say the type: %s",
            len(like.untyped),
            some,
        )
    return found


def on_host(component: str, stored: StoredTensors, plan: RestorePlan) -> Callable[[str], torch.Tensor]:
    """Do what ``new_tensors`` does, but in host memory and with the stored dtype, whatever the caller of ``restore``
    chose."""
    host = Options(device=torch.device("cpu"), dtype=None, selected=lambda _name: True)
    return new_tensors(component, stored, plan, host)


def new_tensors(
    component: str, stored: StoredTensors, plan: RestorePlan, opts: Options
) -> Callable[[str], torch.Tensor]:
    """Return a function that makes, for a key in a component's tree, a new tensor on ``opts.device`` that ``plan``
    fills. It raises as ``find_tensor`` and ``new_tensor`` do."""

    def get(key: str) -> torch.Tensor:
        record = find_tensor(component, key, stored, plan)
        tensor = new_tensor(record, DTYPES[record.dtype], opts.device)
        plan.read.append((record, [Window(tensor)]))
        return tensor

    return get


def new_tensor(
    record: StoredTensor,
    dtype: torch.dtype,
    device: torch.device | str | None,
    strides: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Allocate memory for a stored tensor; ``strides``, in elements, are those of a dense tensor of its shape. Raises
    ``CheckpointDamaged`` for a shape that torch cannot have, and ``MemoryError``."""
    try:
        if strides is not None and record.nbytes:
            return torch.empty_strided(record.shape, strides, dtype=dtype, device=device)
        return torch.empty(record.shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        problem = f"a tensor of shape {list(record.shape)} and {record.nbytes} bytes cannot be made ({error})"
        if not record.nbytes:
            raise CheckpointDamaged(problem) from error
        raise MemoryError(problem) from error


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors of one dtype and shape have the same values, bit for bit."""
    return torch.equal(first.reshape(-1).contiguous().view(torch.uint8), second.reshape(-1).view(torch.uint8))


def mismatch(name: str, record: StoredTensor, live: torch.Tensor, opts: Options) -> str | None:
    """Say why the stored tensor cannot go into the live one, or None where it can."""
    if hides_values(live):
        return f"{name}: {not_saved(record, live)}"
    refused = refusal(live)
    if refused is not None:
        return f"{name}: {refused}"
    if record.shape != tuple(live.shape):
        return f"{name}: saved with shape {list(record.shape)}, live {list(live.shape)}"
    saved = DTYPES[record.dtype]
    if saved == live.dtype:
        return None
    wanted = opts.dtype if live.is_floating_point() and saved.is_floating_point else None
    if wanted is not None and (live.is_meta or live.dtype == wanted):
        return None
    return f"{name}: saved as {saved}, live {live.dtype} (restore(..., dtype={live.dtype}) converts)"


def not_saved(record: StoredTensor, live: Any) -> str:
    """Say that a plain tensor was saved where a live tensor has no bytes of its own."""
    return (
        f"saved as a plain {DTYPES[record.dtype]} tensor, live a {type(live).__name__}; restore into a plain tensor "
        f"and convert it afterwards (quantise the model after restoring it), or make the live one as it was saved"
    )


def find_tensor(component: str, key: str, stored: StoredTensors, plan: RestorePlan) -> StoredTensor:
    """Find the stored tensor that a component's tree refers to with ``key``. Raises ``CheckpointDamaged`` where there
    is none, or the tree has referred to it before."""
    record = stored.get(f"{component}.{key}")
    if record is None:
        raise CheckpointDamaged(f"state.json refers to tensor {component}.{key:.80}, which the manifest does not list")
    if key in plan.used:  # a forged reference takes thirty characters, and would cost the tensor's memory each time
        raise CheckpointDamaged(f"state.json refers to tensor {component}.{key:.80} twice")
    plan.used.add(key)
    return record


def qualified_records(components: Mapping[str, ComponentRecord]) -> Iterable[tuple[str, StoredTensor]]:
    """Yield each stored tensor under each of its names, ``component.fqn``; a tied tensor has several."""
    for component, record in components.items():
        for fqn, tensor in record.tensors.items():
            yield f"{component}.{fqn}", tensor
        for alias, target in record.aliases.items():
            yield f"{component}.{alias}", record.tensors[target]


class QualifiedRecords(Mapping[str, StoredTensor]):
    """``QualifiedRecords`` maps each name that ``qualified_records`` yields to its tensor, without looking at those
    that nobody asks for. The same name always gives the same object."""

    def __init__(self, components: Mapping[str, ComponentRecord]) -> None:
        self._components = components

    def __getitem__(self, name: str) -> StoredTensor:
        component, _, fqn = name.partition(".")  # a component's name has no dots
        record = self._components[component]
        return record.tensors[record.aliases.get(fqn, fqn)]

    def get(self, name: str, default: Any = None) -> Any:
        component, _, fqn = name.partition(".")
        record = self._components.get(component)
        if record is None:
            return default
        return record.tensors.get(record.aliases.get(fqn, fqn), default)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        component, _, fqn = name.partition(".")
        record = self._components.get(component)
        return record is not None and (fqn in record.tensors or fqn in record.aliases)

    def __iter__(self) -> Iterator[str]:
        for component in self._components:
            yield from self.of(component)

    def of(self, component: str) -> Iterator[str]:
        """Yield the names of one component's tensors; none where there is no such component."""
        record = self._components.get(component)
        if record is not None:
            yield from (f"{component}.{fqn}" for fqn in itertools.chain(record.tensors, record.aliases))

    def __len__(self) -> int:
        return sum(len(record.tensors) + len(record.aliases) for record in self._components.values())


def names_of(component: str, stored: StoredTensors) -> Iterator[str]:
    """Yield the qualified names that begin with the component's, without looking at the tensors of others where none is
    renamed."""
    if isinstance(stored, QualifiedRecords):
        yield from stored.of(component)
    else:
        yield from (name for name in stored if name.startswith(f"{component}."))


def describe(
    where: str,
    plan: RestorePlan,
    what: str = "the live state",
    way_out: str = "restore(state, strict=False) loads what fits; its include= and rename= choose and map names.",
) -> str:
    """Put all differences into one message. ``where``: the checkpoint. ``what``: what it does not fit."""
    lines = [f"{where} does not fit {what}:"]
    for title, names in (
        ("missing from the checkpoint", plan.missing),
        ("unexpected in the checkpoint", plan.unexpected),
        ("mismatched", plan.mismatched),
    ):
        if names:
            shown = ", ".join(names[:20]) + (f", and {len(names) - 20} more" if len(names) > 20 else "")
            lines.append(f"  {title} ({len(names)}): {shown}")
    lines += [f"  {note}" for note in plan.notes]
    return "\n".join([*lines, way_out])


def load(name: str, call: Callable[[], object]) -> None:
    """Hand over to code that is not this library's what is not filled in place. It may raise anything, also where a
    forged checkpoint has all the right names and holds nonsense. Raises ``StateMismatch`` and ``NotEnoughMemory``."""
    way_out = "If it has to differ from the one that was saved, restore the others without it: leave {name!r} out of"
    with _guarded(name, (StateMismatch, InvalidOption), "does not take what was stored", way_out):
        call()


@contextlib.contextmanager
def asked(name: str) -> Iterator[None]:
    """Make errors of a live object that is asked for its state ``StateMismatch``."""
    way_out = "It has to be one that could be saved; to restore the others, leave {name!r} out of"
    with _guarded(name, (AsyncCkptError,), "cannot be looked at", way_out):
        yield


@contextlib.contextmanager
def _guarded(name: str, passed: tuple[type[Exception], ...], problem: str, way_out: str) -> Iterator[None]:
    """Make errors of code that belongs to component ``name`` typed, but for those of the types ``passed``."""
    try:
        yield
    except passed:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise NotEnoughMemory(f"{name}: no memory for what was stored ({error})") from error
    except Exception as error:
        what = f"{name}: the live object {problem} ({type(error).__name__}: {error})"
        raise StateMismatch(f"{what}. {way_out.format(name=name)} the state") from error
