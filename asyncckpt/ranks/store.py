"""The ranks of a job talk through the store that ``torch.distributed`` runs on.

Nothing here is a collective on a device, so nothing waits for, or disturbs, the training's own communication. In steady
state a save costs each rank one message (its report) and one read (of the outcome), both in the background.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import zstandard

from asyncckpt import errors, interrupts
from asyncckpt.errors import AsyncCkptError, InvalidOption, PlanChanged, RankLost, SaveFailed
from asyncckpt.ranks.connection import JobMessages, connection_to
from asyncckpt.ranks.lateness import LateNotice
from asyncckpt.ranks.rendezvous import rendezvous
from asyncckpt.state.dtensor import job_size

_SHORTEST_PAUSE_SECONDS: Final = 0.001
_LONGEST_PAUSE_SECONDS: Final = 0.1
#: A rank that waits looks again after this fraction of the time waited so far: it learns of an answer at most that
#: much too late.
_LATENESS: Final = 0.03
#: All ranks together look at the store at most so many times a second.
_LOOKS_A_SECOND: Final = 10_000
#: After this long, rank 0 looks at each missing rank by itself, and asks whether it still has to wait.
_A_WHILE_SECONDS: Final = 0.4
#: A report is a list of digests: this is ten million of them.
_MAX_MESSAGE_BYTES: Final = 1 << 30

_SAME_CALLS: Final = "Every rank has to make the same calls"
#: Under this key, and its number, a rank that has closed its checkpointer says so.
_CLOSED: Final = "closed"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankOptions:
    """Says how the ranks of a job deal with each other.

    ``timeout_seconds``: how long a rank that has done its part waits for the others before the save is given up (or
    ``resume`` fails); a call also waits so long for a job's store that does not answer. On a busy file system, ranks
    may be far apart. ``check_replicas``: before each save, on the training thread, digest every byte of the tensors
    that several ranks hold copies of, and not only a sample; where copies differ the save fails and names them.
    ``shared_reading_bytes``: where ranks restore at least so many bytes alike, each reads a part of them from the
    storage and passes it on to the others, in the memory of their host or through the job's default process group
    (gloo or NCCL); None: each reads all that it needs. ``manifest_rows``: where each rank writes files of its own, and
    all of them together are described by more rows than this, a row for each box of a tensor and for each extent, each
    rank writes its part of the manifest itself, and rank 0 merges none of it. Raises ``InvalidOption``."""

    timeout_seconds: float = 300.0
    check_replicas: bool = False
    shared_reading_bytes: int | None = 64 << 20
    manifest_rows: int = 20_000

    def __post_init__(self) -> None:
        if not self.timeout_seconds > 0:
            raise InvalidOption(f"RankOptions.timeout_seconds must be > 0, not {self.timeout_seconds!r}")
        least = self.shared_reading_bytes
        if least is not None and not (isinstance(least, int) and least >= 0):
            raise InvalidOption(f"RankOptions.shared_reading_bytes takes a number of bytes or None, not {least!r}")
        if type(self.manifest_rows) is not int or self.manifest_rows < 0:
            raise InvalidOption(f"RankOptions.manifest_rows takes a whole number of rows, not {self.manifest_rows!r}")


_instances: dict[str, int] = {}
_instances_lock = threading.Lock()


class RankStore:
    """Reaches all ranks of the job, for one ``Checkpointer``. Thread-safe.

    Every rank has to make its checkpointers for one path in the same order. ``messages``: those of this checkpointer.
    """

    def __init__(self, messages: JobMessages, rank: int, size: int, options: RankOptions) -> None:
        self.rank = rank
        self.size = size
        self.options = options
        self._messages = messages.within(options.timeout_seconds)
        self._counts: dict[str, int] = {}

    @classmethod
    def of_job(cls, path: str, options: RankOptions) -> RankStore | None:
        """Find the ranks of this process's job; None where it is alone. Blocks until all of them have called. Raises
        ``RankLost`` after the timeout."""
        if job_size() == 1:
            return None
        from torch.distributed.distributed_c10d import _get_default_store

        where = hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        with _instances_lock:
            number = _instances[where] = _instances.get(where, -1) + 1
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        connection = connection_to(_get_default_store(), rank)
        messages = JobMessages(connection, f"asyncckpt/{where}/{number}", options.timeout_seconds)
        session = rendezvous(messages, rank, size, options.timeout_seconds)
        return cls(messages.below(session), rank, size, options)

    def with_options(self, options: RankOptions) -> RankStore:
        """Return the same ranks with other options."""
        return RankStore(self._messages, self.rank, self.size, options)

    # -- messages ----------------------------------------------------------------------------------------------------

    def post(self, key: str, body: Any) -> None:
        """Leave a message under ``key``. ``body``: anything that JSON has. Blocks for one round trip. Raises
        ``RankLost`` where the store does not answer."""
        self._messages.set(key, _packed(body))

    def exists(self, key: str) -> bool:
        """Whether there is a message under ``key``. Blocks for one round trip. Raises ``RankLost`` where the store does
        not answer."""
        return bool(self._messages.check([key]))

    def read(self, key: str, timeout_seconds: float, peer: str, cancel_key: str | None = None) -> Any:
        """Block until there is a message under ``key``, and return it. Raises ``RankLost``, naming the ``peer`` whose
        message it is, after the timeout or where the store is gone (with the process that ran it), and ``PlanChanged``
        once there is a message under ``cancel_key`` and still none under ``key``."""
        store = self._messages
        notice = LateNotice("answer", timeout_seconds)
        began = time.monotonic()
        while not _checked(store, [key], peer):
            if cancel_key is not None and _checked(store, [cancel_key], peer):
                if _checked(store, [key], peer):  # it came between the two looks, and what came after it was seen
                    break
                raise PlanChanged("names or shapes changed on this rank alone; the next save is planned anew")
            waited = time.monotonic() - began
            if waited >= timeout_seconds:
                raise RankLost(f"{peer} did not answer within {timeout_seconds:.0f} s: it died, hangs, or was stopped")
            if waited >= _A_WHILE_SECONDS and store.check([_closed(0)]) and not store.check([key]):
                raise RankLost(f"{peer} has closed its Checkpointer, and answers no more. {_SAME_CALLS}")
            notice.look(waited, peer)
            self._pause(waited)
        return _unpacked(store.get(key))

    def gather(
        self,
        key: str,
        timeout_seconds: float,
        operation: str,
        stop_when: Callable[[int, Any], bool] = lambda _rank, _body: False,
        skip_missing: Callable[[int], bool] = lambda _rank: False,
        *,
        ranks: Collection[int] | None = None,
        arrivals: dict[int, float] | None = None,
    ) -> list[Message]:
        """Block until every other rank, or each of ``ranks``, has posted under ``key/<rank>``, and return the messages
        by rank (none for rank 0, and for those that were not to post). For rank 0. The messages stay in the store until
        those that have posted them ``forget`` them. ``arrivals``: is told how long each was waited for, in seconds.

        Returns early, with None for ranks that are missing, as soon as ``stop_when(rank, body)`` is true for a message,
        or, after a while, ``skip_missing(rank)`` for a rank that has posted none. Raises ``RankLost`` naming the
        missing ranks, and the ``operation`` that they did not do, after the timeout.
        """
        store = self._messages
        found = [Message(None)] * self.size
        missing = set(range(1, self.size) if ranks is None else ranks)
        notice = LateNotice(operation, timeout_seconds)
        began = time.monotonic()
        while missing:
            waited = time.monotonic() - began
            late = waited >= _A_WHILE_SECONDS
            # asked for all at once, as all usually are there; later one by one, so that a failure is heard of early
            ready = missing if _checked(store, [f"{key}/{rank}" for rank in missing], "the job's store") else set()
            if not ready and late:
                ready = {rank for rank in missing if store.check([f"{key}/{rank}"])}
            ranked = sorted(ready)
            for rank, data in zip(ranked, store.get_many([f"{key}/{rank}" for rank in ranked]), strict=True):
                found[rank] = Message(data)
                if arrivals is not None:
                    arrivals[rank] = waited
                if stop_when(rank, found[rank].read()):
                    return found
            missing = missing - ready
            if not missing or (late and any(skip_missing(rank) for rank in missing)):
                break
            if waited >= timeout_seconds:
                raise RankLost(
                    f"{_names(missing)} did not {operation} within {timeout_seconds:.0f} s. {_SAME_CALLS}; one that "
                    f"died or hangs has to be restarted with the job"
                )
            if late and key != _CLOSED:
                left = {rank for rank in missing if store.check([_closed(rank)]) and not store.check([f"{key}/{rank}"])}
                if left:
                    raise RankLost(f"{_names(left)} closed its Checkpointer, and will not {operation}. {_SAME_CALLS}")
            notice.look(waited, _names(missing))
            self._pause(waited)
        return found

    def _pause(self, waited_seconds: float) -> None:
        """Sleep between two looks at the store: the longer, the longer the rank has waited."""
        shortest = max(_SHORTEST_PAUSE_SECONDS, self.size / _LOOKS_A_SECOND)
        time.sleep(min(_LONGEST_PAUSE_SECONDS, max(shortest, _LATENESS * waited_seconds)))
        interrupts.deliver()

    def forget(self, *keys: str) -> None:
        """Take messages out of the store. Never raises."""
        store = self._messages
        with contextlib.suppress(RankLost):
            for key in keys:
                store.delete_key(key)

    def agree(self, operation: str, body: Any, *, key: str | None = None, cancel_key: str | None = None) -> list[Any]:
        """Exchange ``body`` among all ranks: blocks until all have called, and returns everyone's, by rank, on every
        rank. Raises ``RankLost``, and on every rank the error of one that called ``decline`` instead.

        For what happens now and then on the training thread: opening, planning, restoring. ``key`` names this call
        among others for the same ``operation`` (default: a count of them). Once there is a message under
        ``cancel_key``, ranks other than 0 wait no longer and raise ``PlanChanged``.
        """
        number = -1
        if key is None:
            number = self._counts[operation] = self._counts.get(operation, -1) + 1
            key = f"{operation}/{number}"
        timeout = self.options.timeout_seconds
        if self.rank:
            self.post(f"{key}/{self.rank}", {"body": body})
            answer = self.read(f"{key}/all", timeout + 10, "rank 0", cancel_key)
            self.forget(f"{key}/{self.rank}")
            if "declined" in answer:
                raise error_from_json(answer["declined"], answer.get("who", ""))
            return list(answer["bodies"])
        try:
            found = self.gather(key, timeout, f"call {operation}", lambda _rank, answer: "declined" in answer)
            answers = [message.read() for message in found]
            for rank, answer in enumerate(answers):
                if answer is not None and "declined" in answer:
                    raise error_from_json(answer["declined"], f"rank {rank}")
        except AsyncCkptError as error:
            self.post(f"{key}/all", {"declined": error_to_json(error)})
            raise
        bodies = [body, *(answer["body"] for answer in answers[1:])]
        self.post(f"{key}/all", {"bodies": bodies})
        if number > 0:
            self.forget(f"{operation}/{number - 1}/all")
        return bodies

    def decline(self, key: str, error: BaseException) -> None:
        """Tell whoever calls ``agree`` with this ``key`` that this rank will not, because of ``error``, which all of
        them raise then. Blocks for one round trip. Raises ``RankLost`` where the store does not answer."""
        self.post(f"{key}/{self.rank or 'all'}", {"declined": error_to_json(error), "who": f"rank {self.rank}"})


@dataclass(frozen=True, slots=True)
class Message:
    """A message as it came, which is a few bytes while thousands of them wait for the last one; ``data`` is None where
    there is none."""

    data: bytes | None

    def read(self) -> Any:
        """Return what the message says, None where there is none. Each call parses it anew."""
        return None if self.data is None else _unpacked(self.data)


def _closed(rank: int) -> str:
    return f"{_CLOSED}/{rank}"


def _checked(store: JobMessages, keys: Sequence[str], peer: str) -> bool:
    try:
        return store.check(keys)
    except RankLost as error:
        raise RankLost(f"{peer}: {error}") from error


def _names(ranks: Collection[int]) -> str:
    chosen = sorted(ranks)
    shown = ", ".join(map(str, chosen[:16])) + (f" and {len(chosen) - 16} more" if len(chosen) > 16 else "")
    return f"rank{'s' if len(chosen) > 1 else ''} {shown}"


def _packed(body: Any) -> bytes:
    return zstandard.compress(json.dumps(body, separators=(",", ":")).encode("utf-8", "surrogatepass"), 1)


def _unpacked(data: bytes) -> Any:
    text = zstandard.ZstdDecompressor().decompress(data, max_output_size=_MAX_MESSAGE_BYTES)
    return json.loads(text.decode("utf-8", "surrogatepass"))


def error_to_json(error: BaseException) -> dict[str, str]:
    """Return an error as a message; ``error_from_json`` is the inverse."""
    return {"type": type(error).__name__, "message": str(error)}


def error_from_json(
    body: Mapping[str, str], who: str = "", otherwise: type[AsyncCkptError] = SaveFailed
) -> AsyncCkptError:
    """Make the error that this rank raises of another rank's message: of the same type where that is one of this
    library's, else of the type ``otherwise``."""
    message = f"{who}: {body['message']}" if who else body["message"]
    kind = getattr(errors, body["type"], None)
    if not (isinstance(kind, type) and issubclass(kind, AsyncCkptError)):
        return otherwise(f"{body['type']}: {message}")
    return kind(message)
