"""Faults are tried on these kinds of saves: one of each format, and of each thing that happens around a save."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from asyncckpt import Checkpointer, Delta, KeepLast, Run, WriterOptions
from asyncckpt.storage.lease import read_holder
from support.options import by_stage

#: This step is saved again and again where ``overwrite`` is tried.
SAME_STEP = 7


@dataclass(frozen=True)
class Scenario:
    """Says how a run saves. A *generation* is one save; its number is in every byte that the save holds."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def step(self, generation: int) -> int:
        return SAME_STEP if self.options.get("overwrite") else generation

    def checkpointer(self, path: Path, **more: Any) -> Checkpointer:
        options = {"keep": KeepLast(2), "extent_bytes": 64 << 10, "staging_bytes": 1 << 20, **self.options, **more}
        return Checkpointer(
            path, **by_stage(**{"writer": WriterOptions(threads=2, durable_timeout_seconds=60), **options})
        )


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("safetensors", {"incremental": False}),
        Scenario("links"),
        Scenario("encoded", {"codec": "planes", "incremental": False}),
        Scenario("delta", {"codec": "planes", "delta": Delta(chain=2)}),
        Scenario("zarr", {"format": "zarr"}),
        Scenario("zarr-planes", {"format": "zarr", "codec": "planes"}),
        Scenario("retention", {"keep": KeepLast(1)}),
        Scenario("overwrite", {"overwrite": True, "keep": ()}),
    )
}


def state_of(generation: int) -> dict[str, Any]:
    """Make a state: a file of several extents that goes past the page cache, a small one, one that never changes, plain
    data."""
    return {
        "w": torch.full((70_000,), float(generation)),
        "b": torch.full((17,), generation),
        "still": torch.arange(20_000),  # it is linked from save to save, where links are taken
        "rests": torch.full((20_000,), generation // 3),  # it is linked now and then, together with what it builds on
        "meta": {"generation": generation},
    }


def generation_in(run: Run, step: int | None) -> int:
    """Restore a checkpoint (None is the newest), and return its generation, to which every value must belong."""
    state = state_of(-1)
    run.restore(state, step)
    generation = int(state["meta"]["generation"])
    expected = state_of(generation)
    for name in ("w", "b", "still", "rests"):
        assert torch.equal(state[name], expected[name]), f"{name} is not that of generation {generation}"
    return generation


def check_visible(path: Path) -> dict[int, int]:
    """Check that whatever is visible verifies and belongs to one save. Return the generation of each step."""
    run = Run(path, direct=False)
    found: dict[int, int] = {}
    for entry in run.ls():
        assert entry.damage is None, f"torn and visible: {entry}"
        assert run.verify(entry.step) == [], f"visible and damaged: {entry}"
        found[entry.step] = generation_in(run, entry.step)
    return found


def leftovers(path: Path) -> list[str]:
    """List attempts and deletions that nobody has tidied up, without the lease's next record while its holder writes
    it."""
    holder = read_holder(str(path))
    beat = f".tmp-lease-{holder.owner}" if holder is not None and not holder.released else None
    names = os.listdir(path) if path.exists() else []
    return [name for name in names if name.startswith((".tmp-", ".trash-")) and name != beat]


def open_files() -> dict[str, str]:
    """List this process's descriptors."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def fork(child: Callable[[int], None]) -> tuple[int, int]:
    """Run ``child(pipe)`` in a fork that never returns here. Return its pid, and the end of the pipe to read from."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # a fork lacks the parent's OpenMP threads
            os.close(read_end)
            child(write_end)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(3)
    os.close(write_end)
    return pid, read_end


def acknowledge(pipe: int, generation: int) -> None:
    """Tell the parent that this generation is durable."""
    os.write(pipe, generation.to_bytes(8, "little"))


def acknowledged(read_end: int) -> int:
    """Return the newest generation that a child, now dead, has acknowledged; 0 without one."""
    with os.fdopen(read_end, "rb") as pipe:
        data = pipe.read()
    return max((int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)), default=0)


def count(name: str, default: int) -> int:
    """Read from the environment how many to run: ``make faults`` asks for more than the default."""
    return int(os.environ.get(f"ASYNCCKPT_{name}", default))
