"""Which tensors a conversion takes, under which names, and what it may leave behind."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from asyncckpt.errors import InvalidOption, UnsupportedValue


@dataclass(frozen=True, kw_only=True)
class Selection:
    """``include`` and ``exclude`` are shell patterns (``*``, ``?``, ``[…]``) for the names that the source has, with
    the component (``model.wte.weight``) or without it. ``rename`` maps a name, or the beginning of names up to a dot,
    to another; the longest that fits counts. ``drop`` has patterns for what may be lost."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    drop: Sequence[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    #: Patterns and names that have matched something.
    _used: set[str] = field(default_factory=set, repr=False, compare=False)

    def takes(self, component: str, name: str) -> bool:
        """Return whether the tensor ``name`` of ``component`` is to be converted."""
        qualified = f"{component}.{name}" if component and name else component or name
        wanted = not self.include
        for pattern in self.include:
            if _matches(pattern, name, qualified):
                self._used.add(f"--include {pattern}")
                wanted = True
        for pattern in self.exclude:
            if _matches(pattern, name, qualified):
                self._used.add(f"--exclude {pattern}")
                wanted = False
        return wanted

    def renamed(self, name: str) -> str:
        """Return the name that a tensor of this name gets."""
        fitting = [old for old in self.rename if not old or name == old or name.startswith(f"{old}.")]
        if not fitting:
            return name
        old = max(fitting, key=len)
        self._used.add(f"--rename {old}")
        new, rest = self.rename[old], name[len(old) :].removeprefix(".")
        return ".".join(part for part in (new, rest) if part)

    def may_drop(self, name: str) -> bool:
        """Return whether the user said that this may be lost."""
        found = [pattern for pattern in self.drop if fnmatch.fnmatchcase(name, pattern)]
        self._used.update(f"--drop {pattern}" for pattern in found)
        return bool(found)

    def check_losses(self, losses: Mapping[str, str], where: str) -> dict[str, str]:
        """Return what is lost of what is chosen, by name with the reasons, where the user allows all of it. Raises
        ``UnsupportedValue``, which names the rest."""
        losses = {name: why for name, why in losses.items() if self.takes("", name)}
        refused = {name: why for name, why in losses.items() if not self.may_drop(name)}
        if refused:
            shown = [f"{name} ({why})" for name, why in list(refused.items())[:10]]
            more = f" and {len(refused) - 10} more" if len(refused) > 10 else ""
            first = next(iter(refused))
            raise UnsupportedValue(
                f"{where}: this would be lost: {'; '.join(shown)}{more}. Leave it behind on purpose with --drop "
                f"{first!r} (or a pattern, --drop '*'; in Python Selection(drop=[…]))"
            )
        return dict(losses)

    def check_used(self, where: str) -> None:
        """Raise ``InvalidOption`` for a pattern or a name that has matched nothing: it is misspelt, most likely."""
        given = [f"--include {p}" for p in self.include] + [f"--exclude {p}" for p in self.exclude]
        given += [f"--rename {old}" for old in self.rename]
        unused = [text for text in given if text not in self._used]
        if unused:
            raise InvalidOption(f"{where}: nothing there is called so: {', '.join(unused)}")


def parse_renames(given: Iterable[str]) -> dict[str, str]:
    """Return what the texts ``OLD=NEW`` map. Raises ``InvalidOption``."""
    renames: dict[str, str] = {}
    for text in given:
        old, equals, new = text.partition("=")
        if not equals or old in renames or not (old or new):
            raise InvalidOption(f"--rename {text!r}: give OLD=NEW, each OLD once, such as --rename transformer=model")
        renames[old] = new
    return renames


def checked_names(renamed: Iterable[tuple[str, str]], where: str) -> None:
    """Raise ``InvalidOption`` where two tensors got one name. ``renamed``: old and new names."""
    taken: dict[str, str] = {}
    for old, new in renamed:
        other = taken.setdefault(new, old)
        if other != old:
            raise InvalidOption(f"{where}: {other!r} and {old!r} would both be called {new!r}; --rename one otherwise")


def _matches(pattern: str, name: str, qualified: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(qualified, pattern)
