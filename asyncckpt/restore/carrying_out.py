"""A restore is carried out in steps: what changes nothing comes first, and what may still be refused next.

In a job all ranks take each step together: an error of one is raised on all before the next step begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from asyncckpt.errors import AsyncCkptError, NotEnoughMemory, RestoreFailed, storage_failed
from asyncckpt.manifest.records import Manifest
from asyncckpt.protocols import Reader
from asyncckpt.read.damage import Damage
from asyncckpt.read.extents import Consume, Extents, read_alone
from asyncckpt.read.fill import Wanted, fill
from asyncckpt.read.opening import OpenCheckpoint
from asyncckpt.restore.changes import Changes
from asyncckpt.restore.live_memory import Memory
from asyncckpt.restore.order import FIRST, GENERATORS, OBJECTS, SCHEDULERS, TENSORS, turn_of
from asyncckpt.restore.plan import RestorePlan
from asyncckpt.restore.shared_memory import separate


class Stages:
    """The steps of a restore by one process alone; ``ranks.coordinator.RestoreStages`` takes them with all ranks."""

    rank = 0
    #: The number of ranks that restore together.
    size = 1

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Run the body as one step, named ``what``. An error of it is raised on every rank."""
        yield

    def read(self, reader: Reader, manifest: Manifest, wanted: Extents, consume: Consume) -> list[Damage]:
        """Read extents as ``read_extents`` does; every rank has to call this as often within a step."""
        return read_alone(reader, manifest, wanted, consume)

    def in_all(self, names: list[str]) -> list[str]:
        """Return those of the names that every rank gives."""
        return names


@dataclass(slots=True)
class Planned:
    """Holds the plans of all components, and carries them out. ``changes`` gets to know what is changed."""

    state: Mapping[str, Any]
    changes: Changes
    _by_name: dict[str, RestorePlan] = field(default_factory=dict)
    _turns: dict[str, int] = field(default_factory=dict)

    @property
    def plans(self) -> list[RestorePlan]:
        """Return the plans, in the order of the state."""
        return list(self._by_name.values())

    def add(self, name: str, plan: RestorePlan) -> None:
        """Add a component's plan."""
        self._by_name[name] = plan

    def prepare(self) -> None:
        """Look at the memory of every live tensor that is to be filled: what cannot be written to is a mismatch, and
        what shares memory is set apart. Changes nothing. Raises ``NotEnoughMemory``."""
        memory = Memory()
        for name, plan in self._by_name.items():
            problems = memory.problems([target.window.tensor for target in plan.fill])
            plan.mismatched += [f"{plan.fill[number].where}: {problem}" for number, problem in problems.items()]
            if problems:
                plan.fill = [target for number, target in enumerate(plan.fill) if number not in problems]
            turn = turn_of(name, self.state)
            self._turns[name] = OBJECTS if turn < TENSORS and plan.collect else turn
        separate([plan for _, plan in self._of(FIRST, SCHEDULERS, TENSORS, OBJECTS, GENERATORS)])

    def carry_out(self, checkpoint: OpenCheckpoint, together: Stages) -> int:
        """Read everything, and give it to the live state. Return how many bytes were read. Blocks."""
        path = checkpoint.path
        new = [read for plan in self.plans for read in plan.read]
        with together.stage("read"), typed(path, "reading into new memory"):
            nbytes = fill(checkpoint, new, read=together.read)
            for plan in self.plans:
                for check in plan.checks:
                    check()
        with together.stage("load objects"), typed(path, "handing over what objects of their own load"):
            nbytes += self._fill(checkpoint, together, new, FIRST, SCHEDULERS)
            self._run(lambda plan: plan.finish, FIRST, SCHEDULERS)
        with together.stage("fill"), typed(path, "filling live tensors"):
            nbytes += self._fill(checkpoint, together, new, TENSORS, OBJECTS, GENERATORS)
        with together.stage("load modules"), typed(path, "handing over what is not filled in place"):
            self._run(lambda plan: plan.collect, TENSORS, OBJECTS, GENERATORS)  # all ranks have come here
            self._run(lambda plan: plan.finish, TENSORS)
        with together.stage("load the rest"), typed(path, "handing over what is not filled in place"):
            self._run(lambda plan: plan.finish, OBJECTS)
            self._run(lambda plan: plan.finish, GENERATORS)
        return nbytes

    def _of(self, *turns: int) -> list[tuple[str, RestorePlan]]:
        """Return the components whose turn is one of ``turns``, in the order of these, with their plans."""
        return [(name, plan) for turn in turns for name, plan in self._by_name.items() if self._turns[name] == turn]

    def _run(self, steps: Callable[[RestorePlan], list[Callable[[], None]]], *turns: int) -> None:
        for name, plan in self._of(*turns):
            for step in steps(plan):
                self.changes.begin(name)
                step()

    def _fill(self, checkpoint: OpenCheckpoint, together: Stages, beside: Wanted, *turns: int) -> int:
        targets = [target for _, plan in self._of(*turns) for target in plan.fill]

        def begun(numbers: Sequence[int]) -> None:
            chosen = [targets[number] for number in numbers]
            names = {target.where.partition(".")[0] for target in chosen}
            names.update(where.partition(".")[0] for target in chosen if target.also for where in target.also)
            for name in names:
                self.changes.begin(name)

        wanted = [(target.record, [target.window]) for target in targets]
        nbytes = fill(checkpoint, wanted, begun, beside, together.read)
        self._run(lambda plan: plan.place, *turns)
        return nbytes


@contextlib.contextmanager
def typed(path: str, doing: str) -> Iterator[None]:
    """Make every error of the body one of this library's. ``path``: the checkpoint's. ``doing``: what the body does."""
    try:
        yield
    except AsyncCkptError:
        raise
    except OSError as error:
        raise storage_failed(path, error, doing) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise NotEnoughMemory(f"{path}: no memory for {doing} ({error})") from error
    except Exception as error:
        raise RestoreFailed(f"{path}: {doing} failed ({type(error).__name__}: {error})") from error
