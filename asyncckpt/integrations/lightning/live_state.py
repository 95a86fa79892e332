"""Of a sharded training, the live model and optimizers are saved themselves, not dictionaries of their values.
Lightning makes dictionaries before it saves, and hands them to hooks: here these are filled only where a hook looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from asyncckpt.errors import InvalidOption


class LiveState(MutableMapping[str, Any]):
    """Stands for the ``state_dict`` of a live object in a checkpoint of Lightning's.

    ``what``: how people call it. ``read``: returns the ``state_dict``; it is called once, where somebody looks. It may
    raise. For the training thread."""

    def __init__(self, what: str, read: Callable[[], Any]) -> None:
        self._what = what
        self._read = read
        self._found: dict[str, Any] | None = None
        self._before: Any = None

    def _values(self) -> dict[str, Any]:
        if self._found is None:
            self._found = dict(self._read())
            self._before = _identities(self._found)
        return self._found

    def check_unchanged(self) -> None:
        """Raise ``InvalidOption`` where somebody has put other values into it: they would not be saved."""
        if self._found is not None and _identities(self._found) != self._before:
            raise refused(self._what)

    def __getitem__(self, key: str) -> Any:
        return self._values()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._values()[key] = value

    def __delitem__(self, key: str) -> None:
        del self._values()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())


def refused(what: str) -> InvalidOption:
    """Return the error for a hook that has changed what stands for a live object."""
    return InvalidOption(
        f"a hook has changed checkpoint[{what!r}] before the save. The model and the optimizers themselves are saved "
        f"by this strategy, every rank its part: put what a hook adds under a key of its own"
    )


def _identities(value: Any) -> Any:
    """Return what is equal as long as the same objects are at the same places of nested containers."""
    if isinstance(value, dict):
        return {key: _identities(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_identities(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else id(value)
