"""The journal of a run has a line for each save, restore, fall-back, deletion and verification.

It lies beside the checkpoints and is a hint, never truth: nothing is decided by it, a line may be missing, torn or
forged, and nothing waits for it. It is bounded: the oldest lines go.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from asyncckpt.errors import AsyncCkptError
from asyncckpt.events import Committed, Event, Failed, FellBack, Pruned, RanksReported, Restored, ThinnedOut
from asyncckpt.manifest import environment
from asyncckpt.manifest.json import metric_to_json
from asyncckpt.protocols import Store
from asyncckpt.storage.journal_file import JOURNAL, JOURNAL_BEFORE, JOURNAL_BYTES, append_line
from asyncckpt.storage.local import LocalStore

log = logging.getLogger("asyncckpt")

#: Lines of one process that wait for a disk which does not answer; more are dropped.
_WAITING: Final = 1000
#: Whoever closes a journal waits so long for the lines that are left.
_CLOSE_SECONDS: Final = 1.0
_TEXT: Final = 300
_METRICS: Final = 40
_LINE_BYTES: Final = 16 << 10
#: What a line can be about.
KINDS: Final = frozenset({"save", "ranks", "failed", "restore", "fallback", "delete", "thin", "verify"})


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One line. ``what``: ``save``, ``failed``, ``restore``, ``fallback``, ``delete``, ``thin`` or ``verify``.
    ``at_unix_seconds``: when, by the clock of ``host``; ``pid``: the process. ``fields`` has the rest, as the table in
    docs/format.md says; whoever reads it must be ready for anything there."""

    what: str
    at_unix_seconds: float
    step: int
    name: str = ""
    host: str = ""
    pid: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)

    def number(self, key: str) -> float | None:
        """Return a field that is a finite number, or None."""
        value = self.fields.get(key)
        usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if usable and isinstance(value, int | float) else None

    def text(self, key: str) -> str:
        """Return a field that is text, or an empty one."""
        value = self.fields.get(key)
        return value if isinstance(value, str) else ""

    def numbers(self, key: str) -> dict[str, float]:
        """Return those members of a field that are finite numbers."""
        value = self.fields.get(key)
        rows = value.items() if isinstance(value, dict) else ()
        return {k: float(v) for k, v in rows if type(v) in (int, float) and math.isfinite(v)}


def read_journal(store: Store) -> list[JournalEntry]:
    """Return the lines of a run's journal that can be read, the oldest first; none where it keeps none. Blocks on the
    storage; never raises."""
    found: list[JournalEntry] = []
    for name in (JOURNAL_BEFORE, JOURNAL):
        try:
            with contextlib.closing(store.open("")) as reader:
                data = reader.read_small(name, 2 * JOURNAL_BYTES)
        except (AsyncCkptError, OSError):
            continue
        found += [entry for line in data.split(b"\n") if (entry := _parsed(line)) is not None]
    return found


def _parsed(line: bytes) -> JournalEntry | None:
    try:
        body = json.loads(line) if 0 < len(line) <= _LINE_BYTES else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(body, dict):
        return None
    what, at, step = body.pop("what", None), body.pop("at", None), body.pop("step", None)
    name, host, pid = body.pop("name", ""), body.pop("host", ""), body.pop("pid", 0)
    known = isinstance(what, str) and what in KINDS and isinstance(name, str) and isinstance(host, str)
    counted = type(step) is int and type(pid) is int and type(at) in (int, float) and math.isfinite(at)
    if not known or not counted:
        return None
    return JournalEntry(str(what), float(at), step, name, host, pid, body)


def note(store: Store, what: str, step: int, name: str, **fields: Any) -> None:
    """Append a line to the journal of a run that keeps one, for whoever does not write the run. Never raises."""
    with contextlib.suppress(OSError):
        if isinstance(store, LocalStore):
            append_line(store.path, _line(what, step, name, fields), create=False)


def note_restores(store: Store, event: Event) -> None:
    """Do what ``note`` does for the events of somebody who only reads."""
    if isinstance(event, Restored | FellBack):
        what, step, name, fields = _told(event)
        note(store, what, step, name, **fields)


def _line(what: str, step: int, name: str, fields: Mapping[str, Any]) -> bytes:
    who = {"name": name, "host": socket.gethostname(), "pid": os.getpid()}
    body = {"what": what, "at": time.time(), "step": step, **who, **fields}
    return json.dumps(body, separators=(",", ":"), default=str).encode("ascii", "replace")


def _told(event: Event) -> tuple[str, int, str, dict[str, Any]]:
    """Return what a line says of an event: kind, step, name, and the rest. The kind is empty for what has no line."""
    match event:
        case Committed():
            metrics = dict(list(event.metrics.items())[:_METRICS])
            fields: dict[str, Any] = {
                "kind": event.checkpoint_kind,
                "nbytes": event.nbytes,
                "written_bytes": event.written_bytes,
                "state_bytes": event.state_bytes,
                "stall_seconds": round(event.stall_seconds, 6),
                "durable_seconds": round(event.durable_seconds, 6),
                "commit_seconds": round(event.commit_seconds, 6),
                "metrics": {key[:_TEXT]: metric_to_json(float(value)) for key, value in metrics.items()},
            }
            return "save", event.step, os.path.basename(event.path), fields
        case RanksReported():
            slowest = {
                one.phase: [one.rank, round(one.seconds, 6), round(one.median_seconds, 6)] for one in event.slowest
            }
            waited = round(event.waited_seconds, 6)
            fields = {"ranks": event.ranks, "waited_seconds": waited, "last_rank": event.last_rank, "slowest": slowest}
            return "ranks", event.step, "", fields
        case Failed():
            return "failed", event.step, "", {"reason": f"{type(event.error).__name__}: {event.error}"[:_TEXT]}
        case Restored():
            seconds = round(event.seconds, 6)
            return "restore", event.step, os.path.basename(event.path), {"nbytes": event.nbytes, "seconds": seconds}
        case FellBack():
            return "fallback", event.step, os.path.basename(event.path), {"reason": event.reason[:_TEXT]}
        case Pruned(deleted=True):
            return "delete", event.step, event.name, {}
        case ThinnedOut():
            return "thin", event.step, event.name, {"left": event.left, "freed_bytes": event.freed_bytes}
        case _:
            return "", 0, "", {}


_NOTED = (Committed, RanksReported, Failed, Restored, FellBack, Pruned, ThinnedOut)


class Journal:
    """Keeps the journal of a run for its writer. It is called with every event, and writes on a thread of its own, so
    neither a slow disk nor a full one delays or fails a save: what cannot be written is dropped. Does nothing in a
    forked child."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._pid = os.getpid()
        self._queue: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._told_environment = False

    def __call__(self, event: Event) -> None:
        """Note an event. Never blocks, never raises."""
        if type(event) not in _NOTED or self._closed or os.getpid() != self._pid:
            return
        try:
            what, step, name, fields = _told(event)
            if not what:
                return
            if what == "save" and not self._told_environment:
                self._told_environment = True
                fields["environment"] = environment.record()
            self._queue.put_nowait(_line(what, step, name, fields))
            with self._lock:
                if self._thread is None and not self._closed:
                    self._thread = threading.Thread(target=self._run, name="asyncckpt-journal", daemon=True)
                    self._thread.start()
        except queue.Full:
            pass
        except Exception:  # a number that is none, a host without a name: the save must not learn of it
            log.debug("a line of the journal was not written", exc_info=True)

    def close(self) -> None:
        """Write what is left, for at most a second, and end the thread. Idempotent."""
        with self._lock:
            if self._closed or os.getpid() != self._pid:
                return
            self._closed = True
            thread = self._thread
        if thread is not None:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
            thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                append_line(self._folder, line, create=True)
            except OSError as error:
                log.debug("%s: the journal cannot be written: %s", self._folder, error)
