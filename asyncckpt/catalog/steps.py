"""Keeps account of a run's steps: which are saved or being saved, which is the newest, and which may be saved next."""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from asyncckpt.catalog.lineage import Lineage
from asyncckpt.catalog.names import NameTemplate, another
from asyncckpt.errors import InvalidOption, InvalidStep, StepExists
from asyncckpt.manifest.parse import NUMBER_LIMIT as STEP_LIMIT


@dataclass(frozen=True, slots=True)
class Claim:
    """Stands for one checkpoint that is saved, or being saved, in the directory ``directory``. ``names``: what the save
    was given as names. ``sequence``: the one in its manifest. ``given_up``: the step belongs to a branch that training
    has left, so it may be saved again. ``replaces``: the claims of such a branch whose place this one takes once it is
    durable."""

    directory: str
    sequence: int
    names: tuple[str, ...] = ()
    given_up: bool = False
    replaces: tuple[Claim, ...] = ()


class StepRegistry:
    """Knows in memory which steps are taken, so that no save has to ask the disk on the training thread. Thread-safe.

    ``damaged``: the names of checkpoints that cannot be used; their steps may be saved again.
    """

    def __init__(self, path: str, template: NameTemplate, quarantined: Container[str], *, overwrite: bool) -> None:
        self._path = path
        self._template = template
        self._quarantined = quarantined
        self._overwrite = overwrite
        self._lock = threading.Lock()
        #: By step and kind. A step can have several, each with other names.
        self._claims: dict[tuple[int, str], tuple[Claim, ...]] = {}
        #: The step that training has reached, by kind.
        self._reached: dict[str, int] = {}
        self._sequence = 0
        #: The step that each directory holds to which somebody else has given its name.
        self._foreign: dict[str, int] = {}
        self._opened = False
        self._went_to: int | None = None
        self._lineage = Lineage()

    def add(self, step: int, kind: str, name: str, sequence: int, names: tuple[str, ...] = ()) -> None:
        """Note a checkpoint that the directory holds already. Call this with the oldest save first."""
        with self._lock:
            self._claims[step, kind] = (*self._claims.get((step, kind), ()), Claim(name, sequence, names))
            self._reached[kind] = step
            self._sequence = max(self._sequence, sequence)

    def add_foreign(self, step: int, name: str) -> None:
        """Note a checkpoint that somebody has copied or renamed: its name is taken, its step is not."""
        with self._lock:
            self._foreign[name] = step

    def opened(self) -> None:
        """Note that ``learn`` has been called with all of the directory's checkpoints."""
        with self._lock:
            self._opened = True
            if self._overwrite:  # a run that may overwrite, and restores nothing, starts anew
                for kind in self._reached:
                    self._give_up_after(-1, kind)
                self._reached.clear()
            for kind, step in list(self._reached.items()):
                self._give_up_after(step, kind)
            if self._went_to is not None:
                self._rewind_to(self._went_to)

    def reserve(
        self,
        step: int,
        kind: str,
        metrics: Mapping[str, float],
        names: tuple[str, ...] = (),
        *,
        again: bool = False,
    ) -> Claim:
        """Reserve a step for a new save; with ``names`` also one that has checkpoints already. With ``again``, those of
        the step that training has reached are given up for this one.

        Raises ``InvalidStep`` where the step is no whole number from 0 to below 2**62, or lies before the one that
        training has reached; ``StepExists`` where it is saved or in flight, or somebody else has given its name to a
        directory; and ``InvalidOption`` where the name template needs a metric that is not there.
        """
        if type(step) is not int or step < 0:
            raise InvalidStep(f"step must be a whole number >= 0, not {step!r}")
        if step >= STEP_LIMIT:
            raise InvalidStep(f"step {step} is too large: steps are below 2**62. Count training steps from 0")
        name = self._template.name(step, kind, metrics)
        with self._lock:
            here = self._claims.get((step, kind), ())
            if again and step == self._reached.get(kind):
                here = tuple(replace(claim, given_up=True) for claim in here)
            live = [claim for claim in here if not claim.given_up]
            reached = self._reached.get(kind, -1)
            if name in self._foreign and not names:
                raise StepExists(
                    f"{self._path}/{name} is a copy of the checkpoint of step {self._foreign[name]}, or was renamed; "
                    f"it is left as it is. Move it elsewhere, or save another step"
                )
            usable = [claim for claim in live if claim.directory not in self._quarantined]
            directory: str | None = None
            if not self._overwrite:
                if usable and not names:
                    raise StepExists(
                        f"{self._path}: step {step} is already saved as {usable[-1].directory}. Save another step, use "
                        f"another directory, give the save a name=, or pass run=RunOptions(overwrite=True)"
                    )
                if step < reached:
                    raise InvalidStep(
                        f"{self._path}: step {step} goes backwards, the newest is {reached}. To continue the run "
                        f"call resume() first; to go back, restore(state, step=…) the whole state first; to start "
                        f"anew use another directory or run=RunOptions(overwrite=True)"
                    )
            else:
                directory = self._overwritten(step, live, name, names)
            if directory is None:
                taken = {claim.directory for claim in usable} | self._foreign.keys()
                directory = next(free for i in count(1) if (free := another(name, i)) not in taken)
            if step < reached:  # an overwriting run has gone back: later steps belong to a branch it has left
                self._rewind_to(step) if kind == "full" else self._give_up_after(step, kind)
            self._sequence += 1
            replaced = tuple(claim for claim in here if claim.given_up)
            claim = Claim(directory, self._sequence, names, replaces=replaced)
            kept = tuple(other for other in live if other.directory != directory)
            self._claims[step, kind] = (*kept, claim)
            self._reached[kind] = step
            self._lineage.begin(claim.sequence)
        return claim

    def _overwritten(self, step: int, live: Sequence[Claim], name: str, names: tuple[str, ...]) -> str | None:
        """Return the directory that a save of an overwriting run takes the place of: that of a checkpoint of the step
        with a name in common, or without names as this one is. None where it needs one of its own."""
        for claim in live:
            if set(claim.names) & set(names) or not (claim.names or names):
                if not names and claim.directory != name:
                    raise StepExists(
                        f"{self._path}: step {step} is already saved as {claim.directory}; overwriting needs the same "
                        f"name, and this one would be {name}"
                    )
                return claim.directory
        return None

    def release(self, step: int, kind: str, claim: Claim) -> None:
        """Give a claim back whose save has failed: its step is free again, or belongs again to what it would have
        replaced."""
        self._lineage.end(claim.sequence, None)
        with self._lock:
            known = self._claims.get((step, kind), ())
            own = [one for one in known if one.sequence == claim.sequence]
            if own:
                left = (*own[0].replaces, *(one for one in known if one.sequence != claim.sequence))
                self._put(step, kind, left)

    def _put(self, step: int, kind: str, claims: tuple[Claim, ...]) -> None:
        if claims:
            self._claims[step, kind] = claims
        else:
            self._claims.pop((step, kind), None)

    def durable(self, step: int, kind: str, sequence: int, attempt: str) -> None:
        """Note that the save with this sequence is durable, as ``attempt``: it has replaced what it was to replace."""
        self._lineage.end(sequence, attempt)
        with self._lock:
            known = self._claims.get((step, kind), ())
            self._put(step, kind, tuple(replace(c, replaces=()) if c.sequence == sequence else c for c in known))

    def parent_of(self, sequence: int) -> str:
        """Return the attempt of the checkpoint that the save with this sequence comes from, or "" where training began
        anew. Ask once the saves before it have ended."""
        return self._lineage.parent_of(sequence)

    def replaced_by(self, step: int, kind: str, sequence: int) -> list[str]:
        """Return the names of the directories that have to make way for the save with this sequence, where they are
        there. It may itself be given up by now, for a later one."""
        with self._lock:
            known = tuple(_with_replaced(self._claims.get((step, kind), ())))
            before = [_with_replaced(claim.replaces) for claim in known if claim.sequence == sequence]
            return list(dict.fromkeys(old.directory for claims in before for old in claims))

    def deleted(self, step: int, kind: str, name: str) -> None:
        """Note that retention has deleted a checkpoint: its step is free."""
        with self._lock:
            known = self._claims.get((step, kind), ())
            self._put(step, kind, tuple(c for c in known if c.directory != name or c.replaces))

    def thinned(self, step: int, name: str, left: str, sequence: int, names: tuple[str, ...]) -> None:
        """Note that of a full checkpoint, ``name``, a weights-only one is left, ``left``."""
        self.deleted(step, "full", name)
        with self._lock:
            here = self._claims.get((step, "weights"), ())
            self._claims[step, "weights"] = (*here, Claim(left, sequence, names))

    def rewind_to(self, step: int, attempt: str) -> None:
        """Note that training continues from this full checkpoint: later steps belong to a branch that it has given up.
        Where the directory's checkpoints are not known yet, this takes effect once they are."""
        self._lineage.go_to(attempt)
        with self._lock:
            self._went_to = step
            if self._opened:
                self._rewind_to(step)

    def _rewind_to(self, step: int) -> None:
        self._reached = {kind: min(step, reached) for kind, reached in self._reached.items()} | {"full": step}
        for kind in self._reached:
            self._give_up_after(step, kind)

    def _give_up_after(self, step: int, kind: str) -> None:
        for key, claims in self._claims.items():
            if key[1] == kind:
                self._claims[key] = tuple(replace(claim, given_up=key[0] > step) for claim in claims)

    def last(self) -> int | None:
        """Return the newest full step that was saved, is in flight, or was resumed from."""
        return self._reached.get("full")

    def has(self, step: int) -> bool:
        """Whether a full checkpoint of this step is saved or in flight."""
        claims = self._claims.get((step, "full"), ())
        return any(not claim.given_up and claim.directory not in self._quarantined for claim in claims)


def _with_replaced(claims: Sequence[Claim]) -> Iterator[Claim]:
    """Yield the claims, and all that they replace."""
    for claim in claims:
        yield claim
        yield from _with_replaced(claim.replaces)


def numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Return metrics as floats. A 0-d tensor is read, which waits for its device. Raises ``InvalidOption``."""
    found: dict[str, float] = {}
    if metrics is not None and not isinstance(metrics, Mapping):
        raise InvalidOption(f"metrics must map names to numbers, as in {{'loss': 0.3}}, not {metrics!r:.80}")
    for name, value in (metrics or {}).items():
        try:
            found[str(name)] = float(value.detach() if hasattr(value, "detach") else value)  # torch warns of a loss
        except (TypeError, ValueError) as error:
            raise InvalidOption(f"metrics[{name!r}] is no number: {value!r:.80}") from error
    return found
