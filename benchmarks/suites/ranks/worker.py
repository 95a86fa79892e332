"""``torchrun … -m benchmarks.suites.ranks.worker saves DIRECTORY EVENTS`` makes one measurement on all ranks of a job.

Rank 0 appends one JSON object a line to the file EVENTS. A rank's times count from a barrier; of durations that all
ranks measured, the longest is taken.
"""

from __future__ import annotations

import argparse
import functools
import glob
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import asyncckpt
from asyncckpt.events import Event, ExtentStaged
from asyncckpt.ranks.store import RankOptions, RankStore
from benchmarks import peers
from benchmarks.harness.raw import Ceiling, drop_page_cache
from benchmarks.harness.state import GPT, SIZES, State, all_tensors
from benchmarks.peers.asyncckpt import Asyncckpt
from benchmarks.peers.dcp_async_process import setup as dcp_process
from benchmarks.peers.dcp_async_thread import setup as dcp_thread

#: Each peer saves this often before anything is measured: memory is faulted in, and plans are made.
WARM_SAVES: Final = 2
_TIMEOUT_SECONDS: Final = 300.0
_PAUSE_SECONDS: Final = 0.3


def sharded_state(size: str) -> State:
    """Spread ``benchmarks.harness.state.training_state`` over all ranks: FSDP2, a group a block; alone, plain.
    Collective."""
    torch.manual_seed(0)
    model = GPT(SIZES[size])
    if dist.get_world_size() > 1:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        local: Any = parameter.grad
        (local.to_local() if dist.get_world_size() > 1 else local).normal_(std=1e-2)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"model": model, "optimizer": optimizer}


def saves(directory: str, size: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Measure every peer and a raw write by turns."""
    state = sharded_state(size)
    ceiling = _ceiling(state, directory)
    kinds: dict[str, Callable[[State, str], peers.Session]] = {
        "asyncckpt": lambda state, path: Asyncckpt(state, path, watch=True, staging_bytes=None),
        "dcp_async_thread": dcp_thread,
        "dcp_async_process": dcp_process,
    }
    talk = _Talk()
    sessions = {name: make(state, _made(directory, name)) for name, make in kinds.items()}
    for number in range(1, repeats + WARM_SAVES + 1):
        for name, session in sessions.items():
            yield from _raw(ceiling)
            talk.clear()
            save = _save(session, number)
            if number > WARM_SAVES:
                yield {"kind": "save", "peer": name, **save, **(talk.most() if name == "asyncckpt" else {})}
    for session in sessions.values():
        session.close()


def replicated(directory: str, size: str, _repeats: int) -> Iterator[dict[str, Any]]:
    """Measure the bytes that each rank stages of a state that all hold a copy of, as DDP's ranks do, and those that all
    of them read to get it back: together, and each for itself."""
    torch.manual_seed(0)
    state = {"model": torch.nn.parallel.DistributedDataParallel(GPT(SIZES[size]))}
    staged: list[int] = []

    def count(event: Event) -> None:
        if isinstance(event, ExtentStaged):
            staged.append(event.nbytes)

    with asyncckpt.Checkpointer(_made(directory, "run"), on_event=count) as run:
        run.save(1, state).result(_TIMEOUT_SECONDS)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, sum(staged))
    state_bytes = sum(tensor.nbytes for tensor in all_tensors(state))
    yield {"kind": "staged", "nbytes": shares, "state_bytes": state_bytes}
    path = os.path.join(directory, "run")
    for least_bytes in (0, None, 0, None):
        if dist.get_rank() == 0:
            drop_page_cache(path)
        dist.barrier()
        began, before = time.perf_counter(), _read_bytes()
        with asyncckpt.Checkpointer(path, ranks=RankOptions(shared_reading_bytes=least_bytes)) as run:
            run.resume(state)
        seconds, mine = _longest(time.perf_counter() - began), _read_bytes() - before
        read: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(read, mine)
        found = {"together": least_bytes is not None, "nbytes": sum(read), "state_bytes": state_bytes}
        yield {"kind": "resumed", **found, "seconds": seconds}


def written(directory: str, size: str, _repeats: int) -> Iterator[dict[str, Any]]:
    """Write a checkpoint for ``restores`` to read in another job."""
    with asyncckpt.Checkpointer(_made(directory, "run")) as run:
        run.save(1, sharded_state(size)).result(_TIMEOUT_SECONDS)
    yield {"kind": "written"}


def restores(directory: str, size: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Restore what another number of ranks wrote, by turns with a raw cold read of the same files by one process."""
    state = sharded_state(size)
    ceiling = _ceiling(state, directory)
    path = os.path.join(directory, "run")
    with asyncckpt.Checkpointer(path) as run:
        for number in range(repeats + 1):
            raw = 0.0
            if ceiling is not None:
                raw = ceiling.read(glob.glob(os.path.join(glob.escape(path), "step-*", "*.safetensors")))
                drop_page_cache(path)
            dist.barrier()
            began = time.perf_counter()
            run.restore(state, step=1)
            seconds = _longest(time.perf_counter() - began)
            if number:
                yield {"kind": "restore", "seconds": seconds, "raw_seconds": raw}


MODES: dict[str, Callable[[str, str, int], Iterator[dict[str, Any]]]] = {
    "saves": saves,
    "replicated": replicated,
    "written": written,
    "restores": restores,
}


def _read_bytes() -> int:
    """Return how many bytes this process has asked files for."""
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("rchar")).split()[1])


class _Talk:
    """Counts the messages of this rank through the job's store."""

    def __init__(self) -> None:
        self.sent = self.read = 0
        for name, count in (("post", self._count_sent), ("read", self._count_read)):
            setattr(RankStore, name, _before(count, getattr(RankStore, name)))

    def _count_sent(self) -> None:
        self.sent += 1

    def _count_read(self) -> None:
        self.read += 1

    def clear(self) -> None:
        self.sent = self.read = 0

    def most(self) -> dict[str, int]:
        """Return the counts of the rank other than 0 that had most."""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, self.sent + self.read)
        return {"messages": max(found[1:], default=0)}


def _before(count: Callable[[], None], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def counted(*args: Any, **options: Any) -> Any:
        count()
        return method(*args, **options)

    return counted


def _save(session: peers.Session, number: int) -> dict[str, Any]:
    dist.barrier()
    time.sleep(_PAUSE_SECONDS)
    saved = session.save(number)
    durable = saved.durable.result(_TIMEOUT_SECONDS)
    with session.guard():
        pass
    dist.barrier()
    if dist.get_rank() == 0:
        session.forget(number - 1)
    return {"stall_seconds": _longest(saved.stall_seconds), "durable_seconds": _longest(durable)}


def _raw(ceiling: Ceiling | None) -> Iterator[dict[str, Any]]:
    if ceiling is not None:
        yield {"kind": "raw", "seconds": ceiling.write(), "nbytes": ceiling.nbytes}
    dist.barrier()


def _ceiling(state: State, directory: str) -> Ceiling | None:
    """Make the ceiling on rank 0, for as many bytes as all ranks hold."""
    nbytes = _global_bytes(state)
    noise = None
    if dist.get_rank() == 0:
        noise = torch.randint(0, 1 << 62, (-(-nbytes // 8),)).view(torch.uint8)[:nbytes]
    ceiling = None if noise is None else Ceiling([noise], os.path.join(directory, "raw"))
    dist.barrier()
    return ceiling


def _global_bytes(state: State) -> int:
    """Return the bytes of all ranks together; a tied weight counts once."""
    moments = (value for entry in state["optimizer"].state.values() for value in entry.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in (*state["model"].parameters(), *moments))


def _made(directory: str, name: str) -> str:
    path = os.path.join(directory, name)
    os.makedirs(path, exist_ok=True)
    dist.barrier()
    return path


def _longest(seconds: float) -> float:
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites.ranks.worker", description=__doc__)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("directory", help="on the file system to measure")
    parser.add_argument("events", help="file that rank 0 appends to")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with open(options.events if dist.get_rank() == 0 else os.devnull, "a", buffering=1) as lines:
        for event in MODES[options.mode](options.directory, options.size, options.repeats):
            lines.write(json.dumps(event) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":  # peers that spawn processes import this module again
    main()
