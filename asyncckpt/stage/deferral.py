"""Which tensors may be copied after ``save`` has returned: those that a training step has shown to stay as they are."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from asyncckpt.events import CopiedEagerly, EventBus
from asyncckpt.types import ComponentSnapshot, TensorSpec

#: A tensor is known by its component, its name and what the plan says about it: another shape has to earn it anew.
Key = tuple[str, TensorSpec]


def tensor_name(key: Key) -> str:
    """Return the name under which ``load_tensors`` gives the tensor."""
    return f"{key[0]}.{key[1].name}"


class Deferral:
    """Remembers, for one checkpointer, which tensors have earned to be deferred and which have lost it. Thread-safe.

    A tensor earns it once, when a step's update found it as it was at ``save``. It loses it for good when it was
    changed anywhere else between ``save`` and the update.
    """

    def __init__(self, events: EventBus) -> None:
        self._events = events
        self._lock = threading.Lock()
        self._trusted: set[Key] = set()
        self._lost: set[Key] = set()
        #: Counts the changes of what is above.
        self._changes = 0
        self._cached: tuple[object, tuple[Key, ...]] = (None, ())
        self._found: tuple[object, int, frozenset[int]] = (None, -1, frozenset())

    def keys(self, plan: object, components: Sequence[ComponentSnapshot]) -> tuple[Key, ...]:
        """Return the key of each piece of these components, in order. A training state has the same ones at every save,
        so they are kept as long as ``plan`` is equal. For the training thread."""
        if self._cached[0] != plan:
            self._cached = plan, tuple((one.name, piece.spec) for one in components for piece in one.pieces)
        return self._cached[1]

    def earned(self, keys: Sequence[Key]) -> frozenset[int]:
        """Return the indexes of the tensors that may be deferred. For the training thread."""
        if self._found[0] is not keys or self._found[1] != self._changes:
            with self._lock:
                found = frozenset(n for n, key in enumerate(keys) if key in self._trusted and key not in self._lost)
                self._found = keys, self._changes, found
        return self._found[2]

    def has_lost(self, key: Key) -> bool:
        """Whether the tensor was changed once where deferring it would have torn a checkpoint."""
        return key in self._lost

    def earn(self, keys: Iterable[Key]) -> None:
        """These tensors were found unchanged when an update began."""
        with self._lock:
            self._trusted |= set(keys)
            self._changes += 1

    def lose(self, step: int, keys: Iterable[Key]) -> None:
        """These tensors were changed between the ``save`` of ``step`` and the update. It is said once for each."""
        with self._lock:
            new = sorted({key for key in keys if key not in self._lost}, key=tensor_name)
            self._lost |= set(new)
            self._changes += 1
        if new:
            self._events.emit(CopiedEagerly(step=step, tensors=tuple(map(tensor_name, new))))
