"""Whatever happens to one rank while ranks read for each other, all raise one typed error in time, or go back together,
and nobody waits in a collective for a rank that will not come."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.harness import Crew, Crews, Fault, Me

import asyncckpt
from asyncckpt import RankOptions, RunOptions
from asyncckpt.ranks import host_memory, passing, placing, reading_plan, shared_reading
from asyncckpt.storage.local import LocalStore
from asyncckpt.testing import InterceptedOps

#: A connection to the store takes five seconds where names cannot be looked up.
_TIMEOUT_SECONDS = 8.0
_RANKS = RankOptions(timeout_seconds=_TIMEOUT_SECONDS, shared_reading_bytes=0)
#: Where nobody is lost, nobody waits so long: on a busy machine, a look-up of a name alone takes seconds.
_PATIENT = RankOptions(timeout_seconds=30.0, shared_reading_bytes=0)
#: A rank that stops is found by one deadline where the others wait for its message, and by two while bytes pass.
_BOUND_SECONDS = 2 * _TIMEOUT_SECONDS + 15


class _Ops(InterceptedOps):
    """Passes a point at each read of data. Where ``fails``, every read but the first does."""

    def __init__(self, me: Me, fails: bool) -> None:
        self._me = me
        self._fails = fails

    def before(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if name == "preadv":
            self._me.at("read")
            if self._fails and self._me.passed["read"] > 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return args


def _model() -> torch.nn.ParameterList:
    generator = torch.Generator().manual_seed(3)
    return torch.nn.ParameterList(torch.randn(500 + n, 200, generator=generator) for n in range(24))


def _saved(path: str, step: int, model: torch.nn.ParameterList) -> None:
    with asyncckpt.Checkpointer(path, ranks=_RANKS, files=asyncckpt.Safetensors(extent_bytes=64 << 10)) as run:
        run.save(step, {"model": model}).result(60)


def _small_messages(me: Me, monkeypatch: pytest.MonkeyPatch, carrier: str) -> None:
    """Make so small a state travel in many messages and phases; pass a point at each message. With the carrier "group",
    ranks take themselves to be on different hosts."""
    if carrier == "group":
        monkeypatch.setattr(shared_reading, "boot_id", lambda: str(me.rank))
    monkeypatch.setattr(reading_plan, "MESSAGE_BYTES", 256 << 10)
    monkeypatch.setattr(reading_plan, "PART_BYTES", 1 << 20)
    begin = passing.Passing.begin

    def begun(self: Any, *args: Any) -> Any:
        me.at("pass")
        return begin(self, *args)

    monkeypatch.setattr(passing.Passing, "begin", begun)
    received = host_memory.HostMemory.received

    def taken(self: Any, *args: Any) -> Any:
        for found in received(self, *args):
            me.at("pass")
            yield found

    monkeypatch.setattr(host_memory.HostMemory, "received", taken)


def _restored(
    me: Me, path: str, step: int | None = None, *, ranks: RankOptions = _RANKS, fails: bool = False
) -> dict[str, Any]:
    """Restore into a model of which all is -1; say what came of it."""
    model = _model()
    for tensor in model:
        tensor.data.fill_(-1.0)
    found: dict[str, Any] = {"error": "", "message": "", "step": 0}
    began = time.monotonic()
    run = asyncckpt.Checkpointer(path, ranks=ranks, run=RunOptions(store=LocalStore(path, ops=_Ops(me, fails))))
    try:
        if step is None:
            found["step"] = run.resume({"model": model})
        else:
            found["step"] = run.restore({"model": model}, step).step
    except (asyncckpt.AsyncCkptError, OSError) as error:
        found |= {"error": type(error).__name__, "message": str(error)}
    found["waited"] = time.monotonic() - began
    found["good"] = all(torch.equal(*pair) for pair in zip(_model(), model, strict=True))
    if found["error"] != "RankLost":
        run.close()
    return found


def _struck(me: Me, path: str, carrier: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        _saved(path, 1, _model())
        _small_messages(me, monkeypatch, carrier)
        dist.barrier()
        return _restored(me, path)


@pytest.mark.parametrize("carrier", ["host", "group"])
def test_without_faults_it_passes_many_messages(carrier: str, crews: Crews, tmp_path: Path) -> None:
    found = crews(3).values(_struck, str(tmp_path / "run"), carrier)
    assert [(one["error"], one["step"], one["good"]) for one in found] == [("", 1, True)] * 3


_LOSSES = [
    (carrier, victim, point, nth, how)
    for carrier in ("host", "group")
    for victim in (0, 2)
    for point, nth in (("read", 1), ("read", 3), ("pass", 1), ("pass", 9))
    for how in ("kill", "stop")
]
_SAMPLE = {
    ("group", 0, "pass", 9, "kill"),
    ("group", 2, "pass", 9, "stop"),
    ("host", 2, "read", 3, "kill"),
    ("host", 2, "pass", 1, "stop"),
}


@pytest.mark.parametrize(
    ("carrier", "victim", "point", "nth", "how"),
    [pytest.param(*loss, marks=() if loss in _SAMPLE else pytest.mark.slow) for loss in _LOSSES],
)
def test_a_rank_that_is_lost_ends_the_restore_on_all(
    carrier: str, victim: int, point: str, nth: int, how: str, tmp_path: Path
) -> None:
    with Crew(3) as crew:
        outcomes = crew.run(_struck, str(tmp_path / "run"), carrier, fault=Fault(victim, point, how, nth), timeout=60)
    for one in outcomes:
        if one.rank != victim:
            assert one.ok, one
            assert one.value["error"] == "RankLost", one
            assert one.value["waited"] < _BOUND_SECONDS


def _at_odds(me: Me, path: str, kind: str, step: int | None, carrier: str) -> dict[str, Any]:
    """Restore where something is wrong on rank 1 alone; then once more, where nothing is."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _saved(path, 1, _model())
        changed = _model()
        for tensor in changed:
            tensor.data.add_(1.0)
        _saved(path, 2, changed)
        _small_messages(me, monkeypatch, carrier)
        if me.rank == 0 and kind == "disk":
            with open(next(Path(path).glob("step-*2/*.safetensors")), "r+b") as file:
                file.seek(-1000, os.SEEK_END)  # in the last rank's part
                file.write(bytes(100))
        dist.barrier()
        if me.rank == 1 and kind == "memory":

            def none(nbytes: int) -> Any:
                raise MemoryError

            monkeypatch.setattr(placing, "aligned_buffer", none)
        if me.rank == 1 and kind == "network":
            begin, end = passing.Passing.begin, passing.Passing.end

            def slowly(self: Any, *message: Any) -> Any:
                time.sleep(0.05)  # what came first is found to be wrong while others of the phase have not begun
                return begin(self, *message)

            def flipped(self: Any, ticket: Any, host: torch.Tensor) -> None:
                end(self, ticket, host)
                if ticket.message.owner != 1:
                    host[0] ^= 1

            monkeypatch.setattr(passing.Passing, "begin", slowly)
            monkeypatch.setattr(passing.Passing, "end", flipped)
        me.passed.clear()
        found = _restored(me, path, step, ranks=_PATIENT, fails=me.rank == 1 and kind == "io")
    found["again"] = _restored(me, path, 1, ranks=_PATIENT)
    return found


@pytest.mark.parametrize(
    ("kind", "error", "said", "carrier"),
    [
        ("io", "CheckpointDamaged", ".safetensors [", "host"),
        ("io", "CheckpointDamaged", ".safetensors [", "group"),
        ("memory", "NotEnoughMemory", "no memory to read together", "group"),
        ("network", "RestoreFailed", "look at the network", "group"),
    ],
)
def test_what_goes_wrong_on_one_rank_is_raised_on_all(
    kind: str, error: str, said: str, carrier: str, crews: Crews, tmp_path: Path
) -> None:
    found = crews(3).values(_at_odds, str(tmp_path / "run"), kind, 2, carrier)
    for rank, one in enumerate(found):
        assert one["error"] == error, one
        assert said in one["message"]
        assert rank == 1 or "rank 1" in one["message"]
        assert one["waited"] < _PATIENT.timeout_seconds, "the others waited for a rank that had failed"
        assert (one["again"]["error"], one["again"]["good"]) == ("", True), one["again"]


@pytest.mark.filterwarnings("ignore:checkpoint")
@pytest.mark.parametrize("carrier", ["host", "group"])
def test_damage_that_one_rank_finds_sends_all_back_one(carrier: str, crews: Crews, tmp_path: Path) -> None:
    found = crews(3).values(_at_odds, str(tmp_path / "run"), "disk", None, carrier)
    assert [(one["error"], one["step"], one["good"]) for one in found] == [("", 1, True)] * 3


def _with_options(me: Me, path: str) -> dict[str, Any]:
    _saved(path, 1, _model())
    return _restored(me, path, ranks=dataclasses.replace(_RANKS, shared_reading_bytes=None if me.rank == 1 else 0))


def test_ranks_whose_options_differ_read_alone(crews: Crews, tmp_path: Path) -> None:
    found = crews(2).values(_with_options, str(tmp_path / "run"))
    assert [(one["error"], one["step"], one["good"]) for one in found] == [("", 1, True)] * 2
