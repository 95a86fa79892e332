"""Annotations are metrics that somebody gives a checkpoint after it was saved. They lie beside it, as pins do.

Each is a small object that is only ever created, never changed, so neither a reader nor a second writer can see half of
one. It belongs to one attempt: what is saved again later under the same name has none of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from asyncckpt.errors import AsyncCkptError, CheckpointDamaged, CheckpointNotFound, InvalidOption, StorageFailed
from asyncckpt.jsontree.strict import dumps, loads
from asyncckpt.manifest.json import metric_from_json, metric_to_json
from asyncckpt.manifest.parse import Body
from asyncckpt.protocols import Store

#: The folder they lie in.
ANNOTATIONS = ".annotations"
_FORMAT = "asyncckpt-annotation"
_VERSION = 1
#: The attempt that it belongs to, and a number that rises: the largest holds all that was given before it, too.
_KEY = re.compile(r"(?P<attempt>[0-9a-f]{32})\.(?P<number>[0-9]{6,12})")
_MAX_BYTES = 1 << 20
_MAX_NAME = 200
#: Others that annotate the same checkpoint at once may come first so often.
_TRIES = 100


@dataclass(frozen=True, slots=True)
class Annotation:
    """What was given to one attempt. ``problem``: why it cannot be read; then ``metrics`` is empty, and nobody may
    conclude from it that a checkpoint is worse than another."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    problem: str | None = None


class Annotations:
    """Reads and writes the annotations of one run. Remembers what it has read. Every method blocks on the storage."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[str, Annotation] = {}

    def keys(self) -> dict[str, str]:
        """Return, for each attempt that was annotated, the object that holds all its annotations."""
        newest: dict[str, tuple[int, str]] = {}
        for key in self._store.listing(ANNOTATIONS):
            match = _KEY.fullmatch(key)
            if match is not None:
                newest[match["attempt"]] = max(newest.get(match["attempt"], (-1, "")), (int(match["number"]), key))
        return {attempt: key for attempt, (_, key) in newest.items()}

    def all(self) -> dict[str, Annotation]:
        """Return the annotations by attempt. One that cannot be read says so (``problem``)."""
        keys = self.keys()
        unread = [(attempt, key) for attempt, key in keys.items() if key not in self._read]
        found = {attempt: self._read[key] for attempt, key in keys.items() if key in self._read}
        self._read = {keys[attempt]: one for attempt, one in found.items()}
        for attempt, key in unread:
            try:
                found[attempt] = self._read[key] = self._parsed(key, attempt)
            except (AsyncCkptError, OSError) as error:
                if key in self._store.listing(ANNOTATIONS):  # else it went with its checkpoint
                    found[attempt] = Annotation(problem=str(error))
        return found

    def add(self, attempt: str, metrics: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        """Annotate an attempt, durably: with these metrics and all that it was given before; return the new object's
        key, and all of them. Raises ``OSError``, and ``CheckpointDamaged`` where what was given before cannot be
        read."""
        for _ in range(_TRIES):
            before = self.keys().get(attempt)
            try:
                known = self._parsed(before, attempt).metrics if before is not None else {}
            except CheckpointDamaged as error:
                raise CheckpointDamaged(f"{error}. Remove that file to annotate the checkpoint anew") from error
            together = {**known, **metrics}
            number = int(before.partition(".")[2]) + 1 if before is not None else 1
            key = f"{attempt}.{number:06d}"
            with contextlib.suppress(FileExistsError):  # somebody else's came first: theirs is added to, then
                self._store.put(f"{ANNOTATIONS}/{key}", _encoded(attempt, together))
                return key, together
        raise StorageFailed(f"{self._store.address}/{ANNOTATIONS}: {_TRIES} others annotate this checkpoint at once")

    def withdraw(self, key: str) -> None:
        """Delete one object: the checkpoint that it was written for was not there any more."""
        self._store.delete(f"{ANNOTATIONS}/{key}")

    def remove(self, attempts: Collection[str]) -> None:
        """Delete the annotations of attempts that are gone."""
        for key in self._store.listing(ANNOTATIONS):
            match = _KEY.fullmatch(key)
            if match is not None and match["attempt"] in attempts:
                self._store.delete(f"{ANNOTATIONS}/{key}")

    def _parsed(self, key: str, attempt: str) -> Annotation:
        where = f"{self._store.address}/{ANNOTATIONS}/{key}"
        try:
            with contextlib.closing(self._store.open(ANNOTATIONS)) as reader:
                data = reader.read_small(key, _MAX_BYTES)
        except CheckpointNotFound as error:
            raise CheckpointDamaged(f"{where} is missing") from error
        body = Body(loads(data, where), where)
        if body.take("format", str) != _FORMAT or body.take("format_version", int) != _VERSION:
            raise CheckpointDamaged(f"{where} is no annotation that this version knows")
        metrics = {name: metric_from_json(value, body) for name, value in body.take("metrics", dict).items()}
        if body.take("attempt", str) != attempt or data != _encoded(attempt, metrics):
            raise CheckpointDamaged(f"{where} is damaged: it is not what was written")
        return Annotation(metrics)


def _encoded(attempt: str, metrics: Mapping[str, float]) -> bytes:
    body: dict[str, Any] = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "attempt": attempt,
        "metrics": {name: metric_to_json(value) for name, value in metrics.items()},
    }
    return dumps(body | {"sha256": hashlib.sha256(dumps(body)).hexdigest()})


def is_attempt(text: str) -> bool:
    """Return whether a manifest's attempt can be annotated: it is the hex digits of a uuid, as in all of ours."""
    return re.fullmatch("[0-9a-f]{32}", text) is not None


def check_names(metrics: Mapping[Any, Any]) -> None:
    """Refuse names that no one could rank or type again. Raises ``InvalidOption``."""
    if not isinstance(metrics, Mapping) or not metrics:
        raise InvalidOption(f"annotate takes names and numbers, as in {{'val_loss': 0.3}}, not {metrics!r:.80}")
    for name in metrics:
        usable = isinstance(name, str) and name.strip() == name and name.isprintable() and 0 < len(name) <= _MAX_NAME
        if not usable:
            raise InvalidOption(f"a metric's name is printable text of 1 to {_MAX_NAME} characters, not {name!r:.80}")
