"""An optimizer's stored state goes by the names of parameters: this room knows what was stored under those names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from asyncckpt.manifest.records import ComponentRecord, StoredTensor


@dataclass(frozen=True, slots=True)
class SavedParameter:
    """``SavedParameter`` is a stored parameter under the live name that ``rename`` gives it: ``component`` and ``fqn``,
    which is empty where the component is the tensor itself. ``strides``: in elements, or None where the checkpoint is
    too old to say them."""

    component: str
    fqn: str
    record: StoredTensor
    strides: tuple[int, ...] | None


class SavedParameters:
    """Finds the stored parameters that a name in an optimizer's state may stand for.

    ``components``: those of the checkpoint, by the names that this rank has for them. ``rename``: returns the live
    qualified name of a stored one, or None where it is dropped.
    """

    def __init__(self, components: Mapping[str, ComponentRecord], rename: Callable[[str], str | None]) -> None:
        self._components = components
        self._rename = rename

    def find(self, label: str) -> tuple[list[SavedParameter], bool]:
        """Return the stored parameters that ``label`` may stand for, and whether ``rename`` drops any of them. Several
        are possible where modules have parameters of the same name, such as a model and its average."""
        found: list[SavedParameter] = []
        dropped = False
        for name, key in self._places(label):
            component = self._components[name]
            record = component.tensors.get(component.aliases.get(key, key))
            if record is None:
                continue
            live = self._rename(f"{name}.{key}")
            if live is None:
                dropped = True
                continue
            holder, _, fqn = live.partition(".")
            if component.kind == "tensor" and fqn == "value":
                fqn = ""
            strides = saved_strides(component, component.aliases.get(key, key), record.shape)
            found.append(SavedParameter(holder, fqn, record, strides))
        return found, dropped

    def _places(self, label: str) -> list[tuple[str, str]]:
        holder, _, fqn = label.partition("/")
        places = [(holder, fqn)] if fqn else []
        places += [(label, "value")] if "." not in label else []
        places += [(name, label) for name, component in self._components.items() if component.kind == "module"]
        return [(name, key) for name, key in places if name in self._components]


def saved_strides(component: ComponentRecord, key: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the strides that a stored tensor had in memory, or None where the checkpoint does not say them, as those
    that are older than the fields ``class`` and ``strides`` do not. A tensor with gaps counts as row-major."""
    if not component.type_name:
        return None
    return component.strides.get(key) or row_major(shape)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a row-major tensor of this shape, in elements."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def same_strides(shape: tuple[int, ...], first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Return whether two tensors of this shape lie in memory alike: strides along dimensions of one element decide
    nothing."""
    return 0 in shape or all(a == b for size, a, b in zip(shape, first, second, strict=True) if size != 1)
