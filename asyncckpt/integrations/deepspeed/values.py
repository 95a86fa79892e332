"""What DeepSpeed would pickle is stored as plain data, and made again of that: objects of three kinds of class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from asyncckpt import jsontree
from asyncckpt.errors import CheckpointDamaged, UnsupportedValue

#: This key says that a dict stands for an object, and of which class.
_CLASS: Final = "deepspeed-class"


def to_plain(value: Any, where: str) -> Any:
    """Return ``value`` with plain data in the place of DeepSpeed's own objects; its tensors are the very same. Raises
    ``UnsupportedValue``, which names the place, for anything else that could only be pickled, or that would come back
    as another type. ``where``: the name of the file."""
    plain = _replaced(value)
    if jsontree.needs_live(jsontree.encode(plain, "", lambda _name, _tensor: None, component=where), scalars=False):
        raise UnsupportedValue(
            f"{where}: it holds an enum, a named tuple, a dataclass or a configuration, which DeepSpeed would pickle. "
            f"Give client_state plain values, such as dataclasses.asdict(…) returns"
        )
    return plain


def _replaced(value: Any) -> Any:
    kind = type(value)
    known = _classes()
    if kind in known.values():
        name = next(name for name, one in known.items() if one is kind)
        found = value.value if name == "ZeroStageEnum" else dict(vars(value))
        return {_CLASS: name, "value": found}
    if isinstance(value, dict):
        if _CLASS in value:
            raise UnsupportedValue(f"client_state: the key {_CLASS!r} is taken; rename yours")
        made = {key: _replaced(item) for key, item in value.items()}
        return made if kind is dict else _same_kind(value, made)
    if kind in (list, tuple):
        return kind(_replaced(item) for item in value)
    return value


def _same_kind(value: dict[Any, Any], made: dict[Any, Any]) -> dict[Any, Any]:
    """Return the items of ``made`` in a dict of the kind that ``value`` is."""
    copy = value.copy()
    copy.clear()
    copy.update(made)
    return copy


def from_plain(value: Any, where: str) -> Any:
    """Return what ``to_plain`` was given. Raises ``CheckpointDamaged`` for what it cannot have made."""
    if isinstance(value, dict):
        if _CLASS in value:
            return _made(value, where)
        for key, item in value.items():
            value[key] = from_plain(item, where)
        return value
    if type(value) is list:
        return [from_plain(item, where) for item in value]
    if type(value) is tuple:
        return tuple(from_plain(item, where) for item in value)
    return value


def _made(value: Mapping[str, Any], where: str) -> Any:
    name, found = value[_CLASS], value.get("value")
    kind = _classes().get(name) if isinstance(name, str) else None
    if kind is None or value.keys() != {_CLASS, "value"}:
        raise CheckpointDamaged(f"{where}: there is no class {name!r:.80} of DeepSpeed that its checkpoints hold")
    if name == "ZeroStageEnum":
        try:
            return kind(found)
        except ValueError as error:
            raise CheckpointDamaged(f"{where}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise CheckpointDamaged(f"{where}: this is no {name}: {found!r:.80}")
    made: Any = object.__new__(kind)
    made.__dict__.update(found)
    return made


def _classes() -> dict[str, type]:
    """Return the classes of the objects in DeepSpeed's checkpoints, by name."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return {one.__name__: one for one in (ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address)}


def safe_classes() -> list[Any]:
    """Return what torch's loader has to know to read a file of plain DeepSpeed without running what it says."""
    return list(_classes().values())
