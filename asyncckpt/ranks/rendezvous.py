"""The ranks of a job find each other in a store that may still hold messages of earlier processes.

torchrun's store outlives its workers: after a restart their messages are still there, under the same keys, and every
rank counts from the beginning. So a rank believes only answers to something that this process made up: each rank posts
a random nonce, rank 0 posts the list of them, and a rank believes a list that has its own nonce in it.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from typing import Final, Protocol, TypeVar

from asyncckpt import interrupts
from asyncckpt.errors import RankLost
from asyncckpt.ranks.lateness import LateNotice

_PAUSE_SECONDS: Final = 0.002
_LONGEST_PAUSE_SECONDS: Final = 0.1
#: The other ranks wait so much longer than rank 0, to hear from it which ranks are missing.
_GRACE_SECONDS: Final = 10.0
_Found = TypeVar("_Found")


class Messages(Protocol):
    """Declares the store's calls, each of which blocks for one round trip."""

    def set(self, key: str, value: bytes) -> None: ...

    def get(self, key: str) -> bytes: ...

    def get_many(self, keys: Sequence[str]) -> Sequence[bytes]: ...

    def check(self, keys: Sequence[str]) -> bool: ...

    def delete_key(self, key: str) -> None: ...


def rendezvous(messages: Messages, rank: int, size: int, timeout_seconds: float) -> str:
    """Agree on a name for this group of processes: the same on all of them, and never used by earlier ones.

    Blocks until all ranks have called. After the timeout, raises ``RankLost`` naming those that have not.
    """
    return _lead(messages, size, timeout_seconds) if rank == 0 else _follow(messages, rank, timeout_seconds)


def _follow(messages: Messages, rank: int, timeout_seconds: float) -> str:
    nonce = uuid.uuid4().hex
    messages.set(f"here/{rank}", nonce.encode())

    def listed() -> dict[str, str] | None:
        if not messages.check(["all"]):
            return None
        found = json.loads(messages.get("all"))
        return found if found["nonces"].get(str(rank)) == nonce else None

    notice = LateNotice("begin", timeout_seconds)
    who = "rank 0, or another rank,"
    answer = _until(listed, timeout_seconds + _GRACE_SECONDS, lambda waited: notice.look(waited, who))
    if answer is None:
        raise RankLost(f"rank 0 did not begin within {timeout_seconds:.0f} s. Every rank has to make the same calls")
    if "lost" in answer:
        raise RankLost(answer["lost"])
    session = answer["session"]
    messages.set(f"met/{rank}", f"{session}/{nonce}".encode())
    return session


def _lead(messages: Messages, size: int, timeout_seconds: float) -> str:
    session = uuid.uuid4().hex
    others = set(range(1, size))
    nonces: dict[int, str] = {}
    missing = set(others)

    def all_met() -> bool | None:
        absent = _missing(messages, "here", others)
        if absent:
            missing.clear()
            missing.update(absent)
            return None
        before = dict(nonces)
        asked = sorted(missing or others)  # the nonce of a rank that has not answered may be an earlier process's
        said = messages.get_many([f"here/{rank}" for rank in asked])
        nonces.update((rank, nonce.decode()) for rank, nonce in zip(asked, said, strict=True))
        if nonces != before:
            body = {"session": session, "nonces": {str(rank): nonce for rank, nonce in nonces.items()}}
            messages.set("all", json.dumps(body).encode())
        missing.clear()
        missing.update(_missing(messages, "met", others))
        met = sorted(others - missing)
        for rank, answer in zip(met, messages.get_many([f"met/{rank}" for rank in met]), strict=True):
            if answer != f"{session}/{nonces[rank]}".encode():
                missing.add(rank)
        return None if missing else True

    notice = LateNotice("begin", timeout_seconds)
    if _until(all_met, timeout_seconds, lambda waited: notice.look(waited, _ranks(missing))) is None:
        lost = (
            f"{_ranks(missing)} did not begin within {timeout_seconds:.0f} s. Every rank has to make the same calls; "
            f"one that died or hangs has to be restarted with the job"
        )
        here = {rank for rank in others if messages.check([f"here/{rank}"])}
        known = {str(rank): messages.get(f"here/{rank}").decode() for rank in here}
        messages.set("all", json.dumps({"lost": lost, "nonces": known}).encode())
        raise RankLost(lost)
    for rank in others:
        messages.delete_key(f"here/{rank}")
        messages.delete_key(f"met/{rank}")
    messages.delete_key("all")
    return session


def _missing(messages: Messages, kind: str, ranks: Collection[int]) -> set[int]:
    """Return the ranks that have posted no such message. Costs one round trip where all have."""
    if messages.check([f"{kind}/{rank}" for rank in ranks]):
        return set()
    return {rank for rank in ranks if not messages.check([f"{kind}/{rank}"])}


def _ranks(missing: Collection[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in sorted(missing)[:16])


def _until(there: Callable[[], _Found | None], timeout_seconds: float, look: Callable[[float], None]) -> _Found | None:
    """Ask ``there`` until it returns something, and ``look`` meanwhile with the seconds waited so far."""
    began = time.monotonic()
    deadline = began + timeout_seconds
    pause = _PAUSE_SECONDS
    while (found := there()) is None and time.monotonic() < deadline:
        time.sleep(pause)
        interrupts.deliver()
        look(time.monotonic() - began)
        pause = min(_LONGEST_PAUSE_SECONDS, 1.3 * pause)
    return found
