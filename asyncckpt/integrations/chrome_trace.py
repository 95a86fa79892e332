"""``ChromeTrace`` puts saves and your own training steps on one time axis, for Perfetto or ``chrome://tracing``.

The file is the JSON object form of the Trace Event Format (https://perfetto.dev/docs/getting-started/other-formats).
Stages are complete events (``X``), in one row a stage and thread; whole saves, which may overlap, are async events
(``b``/``e``); what has no length is an instant (``i``). Times are microseconds on ``time.perf_counter``'s clock, so
traces of processes on one machine share an axis.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from typing import Any, Self

from asyncckpt.errors import InvalidOption
from asyncckpt.events import (
    Busy,
    Committed,
    Event,
    ExtentStaged,
    ExtentWritten,
    Failed,
    FellBack,
    Preempting,
    Pruned,
    Restored,
    SaveStarted,
    Staged,
    Stalled,
    Written,
)

#: The rows stand in this order from the top; each thread that does a stage has a row of its own.
_STAGES = ("training", "stall", "staging", "writing", "commit", "restore", "retention")


class ChromeTrace:
    """Records events and writes them to ``path``: ``Checkpointer(..., on_event=ChromeTrace("trace.json"))``.

    The file appears at ``flush`` or ``close``, whole or not at all. The newest ``max_events`` are kept (about 200 bytes
    of memory each), so a run may go on for weeks. Close it after the checkpointer: commits happen in the background.
    Thread-safe; recording costs microseconds and no I/O.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_events: int = 500_000) -> None:
        if type(max_events) is not int or max_events < 1:
            raise InvalidOption(f"ChromeTrace: max_events must be a whole number >= 1, not {max_events!r}")
        self.path = os.path.abspath(os.fspath(path))
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._records: deque[dict[str, Any]] = deque(maxlen=max_events)
        self._rows: dict[tuple[str, str], int] = {}
        self._open_saves: set[int] = set()
        self._closed = False

    def __call__(self, event: Event) -> None:
        """Record one event; ``Checkpointer`` calls this as a subscriber."""
        end, step = event.at_seconds, event.step
        args: dict[str, Any]
        match event:
            case SaveStarted():
                self._save_begins(event)
            case Stalled():
                self._span("stall", event.thread, f"stall in {event.where}", end - event.seconds, end, {"step": step})
            case ExtentStaged():
                args = {"step": step, "bytes": event.nbytes}
                self._span("staging", event.thread, f"stage {step}", end - event.seconds, end, args)
            case ExtentWritten():
                args = {"step": step, "bytes": event.nbytes}
                self._span("writing", event.thread, f"write {step}", end - event.seconds, end, args)
            case Staged():
                self._instant("staging", event.thread, f"{step} staged", end, {"step": step, "bytes": event.nbytes})
            case Written():
                self._instant("commit", event.thread, f"{step} written", end, {"step": step, "bytes": event.nbytes})
            case Committed():
                args = {"step": step, "path": event.path, "durable_seconds": event.durable_seconds}
                self._span("commit", event.thread, f"commit {step}", end - event.commit_seconds, end, args)
                self._save_ends(event, "durable")
            case Failed():
                self._instant("commit", event.thread, f"{step} FAILED", end, {"step": step, "error": str(event.error)})
                self._save_ends(event, "failed")
            case Restored():
                args = {"step": step, "bytes": event.nbytes, "path": event.path}
                self._span("restore", event.thread, f"restore {step}", end - event.seconds, end, args)
            case FellBack():
                self._instant("restore", event.thread, f"{step} unusable", end, {"step": step, "reason": event.reason})
            case Busy():
                self._instant("stall", event.thread, f"busy: {event.policy}", end, {"step": step})
            case Pruned():
                what = "deleted" if event.deleted else "being read, left"
                self._instant("retention", event.thread, f"{step} {what}", end, {"step": step, "name": event.name})
            case Preempting():
                self._instant("training", event.thread, event.signal, end, {"step": step})
            case _:
                self._instant("commit", event.thread, type(event).__name__, end, {"step": step})

    @contextlib.contextmanager
    def span(self, name: str, **args: Any) -> Iterator[None]:
        """Put a part of your own loop on the axis: ``with trace.span("step 7"): …``. ``args`` must be JSON values."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add_span(name, began, time.perf_counter(), **args)

    def add_span(self, name: str, began_seconds: float, ended_seconds: float, **args: Any) -> None:
        """Put a part of your own loop on the axis that was already timed with ``time.perf_counter``."""
        self._span("training", threading.current_thread().name, name, began_seconds, ended_seconds, args)

    def flush(self) -> None:
        """Write what is recorded so far, replacing the file atomically. Blocks on the disk. Raises ``OSError``."""
        with self._lock:
            records = self._metadata() + list(self._records)
        # it lies beside the target, so that the rename cannot cross file systems
        temporary = f"{self.path}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump({"traceEvents": records, "displayTimeUnit": "ms"}, file, separators=(",", ":"), default=str)
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def close(self) -> None:
        """Write the file, and ignore later events. Idempotent. Blocks on the disk. Raises ``OSError``. In a forked
        child, which has not seen all events, this does nothing."""
        if not self._closed and os.getpid() == self._pid:
            self.flush()
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _save_begins(self, event: SaveStarted) -> None:
        args = {"bytes": event.nbytes, "deferred": event.deferred}
        with self._lock:
            self._open_saves.add(event.step)
        self._add(self._save_record(event, "b", args))

    def _save_ends(self, event: Event, outcome: str) -> None:
        with self._lock:
            known = event.step in self._open_saves
            self._open_saves.discard(event.step)
        if known:  # a viewer would draw an end without a beginning from the start of time
            self._add(self._save_record(event, "e", {"outcome": outcome}))

    def _save_record(self, event: Event, phase: str, args: dict[str, Any]) -> dict[str, Any]:
        where = {"cat": "save", "id": event.step, "pid": self._pid, "tid": 0}
        return {"name": f"save {event.step}", "ph": phase, "ts": event.at_seconds * 1e6, **where, "args": args}

    def _span(self, stage: str, thread: str, name: str, began: float, ended: float, args: dict[str, Any]) -> None:
        times = {"ts": began * 1e6, "dur": max(0.0, ended - began) * 1e6}
        self._add({"name": name, "cat": stage, "ph": "X", **times, **self._row(stage, thread), "args": args})

    def _instant(self, stage: str, thread: str, name: str, at: float, args: dict[str, Any]) -> None:
        self._add(
            {"name": name, "cat": stage, "ph": "i", "s": "t", "ts": at * 1e6, **self._row(stage, thread), "args": args}
        )

    def _row(self, stage: str, thread: str) -> dict[str, int]:
        with self._lock:
            return {"pid": self._pid, "tid": self._rows.setdefault((stage, thread), len(self._rows) + 1)}

    def _add(self, record: dict[str, Any]) -> None:
        with self._lock:
            if not self._closed:
                self._records.append(record)

    def _metadata(self) -> list[dict[str, Any]]:
        """Return the names and the order of the rows. The caller holds the lock."""
        about: list[dict[str, Any]] = [
            {"name": "process_name", "ph": "M", "pid": self._pid, "tid": 0, "args": {"name": "asyncckpt"}}
        ]
        rows = sorted(self._rows.items(), key=lambda row: (_STAGES.index(row[0][0]), row[1]))
        for place, ((stage, thread), number) in enumerate(rows):
            where = {"ph": "M", "pid": self._pid, "tid": number}
            about.append({"name": "thread_name", **where, "args": {"name": f"{stage} ({thread})"}})
            about.append({"name": "thread_sort_index", **where, "args": {"sort_index": place}})
        return about
