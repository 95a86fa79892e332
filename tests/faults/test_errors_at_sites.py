"""Every place where a save talks to the kernel can fail, in every way the kernel has; nothing that was acknowledged is
lost, nothing torn is seen, the attempt's traces go, and the next save works once the fault is gone."""

from __future__ import annotations

import errno
import gc
import itertools
import random
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import assert_all_memory_came_back
from support.scenarios import SCENARIOS, Scenario, check_visible, count, leftovers, open_files, state_of

from asyncckpt import AsyncCkptError, DurabilityUnknown
from asyncckpt.testing import READING, Fault, Site, SiteFaultOps

ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EINTR, errno.EMLINK, errno.EINVAL)
#: What a lost reply or a late write-back can answer after all was done.
LATE = (errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EINTR)
#: Operations that can be done in part, and those that can be done and answer with an error still. A descriptor that was
#: never handed out cannot be closed, and one that was not closed is not ours to lose.
HALVES = {"open", "write_file", "pwrite", "reflink"}
READS = READING - {"close_read"}
NEVER_LATE = {"open"} | READS
#: Saves until a site is met again: a file of the scenarios changes with every third.
_LIFE = 4
#: Likewise where what is saved as differences depends on how many were before: with each third, it is all.
_DELTA_LIFE = 9
#: Failed saves shift the one against the other; so do we.
_PHASES = 3
#: Failures after which the rest is not tried.
_ENOUGH = 10


def _spoils_tidying(hits: Sequence[Fault], *, saved: bool) -> bool:
    """Where tidying up fails itself, or a name that was taken (back) is not durable, the next run tidies up."""
    unsettled = [hit for hit in hits if hit.site.operation == "fsync_directory" and hit.site.subject == "."]
    named = [hit for hit in hits if hit in unsettled or hit.site.operation in ("rename_noreplace", "exchange")]
    return (
        any(hit.site.operation in ("scan", "unlink", "rmdir") or hit.site.subject.startswith(".trash-") for hit in hits)
        or any(hit.persistent or saved for hit in unsettled)
        or (len(named) > 1 and bool(unsettled))  # the name was given and taken back, and one sync of the two failed
    )


class Ordeal:
    """One run whose saves meet faults; checks all that must hold after each."""

    def __init__(self, path: Path, scenario: Scenario) -> None:
        self.path = path
        self.scenario = scenario
        self.generation = 0
        self._life = _DELTA_LIFE if "delta" in scenario.options else _LIFE
        self.faults = self.failures = self.unmet = 0
        self.run = scenario.checkpointer(path)
        self.ops = SiteFaultOps(str(path))
        self.run._store.ops = self.ops
        self.durable: dict[int, int] = {}
        self.undecided: dict[int, int] = {}
        for _ in range(self._life):
            self.save()
        self.check()
        self._links = self.run._store.links, self.run._store.reflinks
        self._threads = {thread.name for thread in threading.enumerate()}
        self._files = self._open()

    def sites(self) -> list[Site]:
        """Every site that the saves of one life visit."""
        seen: dict[Site, None] = {}
        for _ in range(self._life):
            self.ops.arm()
            self.save()
            seen.update(dict.fromkeys(self.ops.sites))
        # which thread came first is chance: what is drawn from them is not to be
        return sorted(seen, key=str)

    def save(self) -> BaseException | None:
        """One generation; the error, or None where it is durable. Waits until nothing of it goes on."""
        self.generation += 1
        step = self.scenario.step(self.generation)
        error: BaseException | None
        try:
            error = self.run.save(step, state_of(self.generation)).exception(30)
        except AsyncCkptError as raised:  # an error of the disk that the training thread met itself
            error = raised
        except TimeoutError:
            raise AssertionError(f"step {step} stands still") from None
        self._drain()
        if error is None:
            self.durable[step] = self.generation
        elif isinstance(error, DurabilityUnknown):
            self.undecided[step] = self.generation
        return error

    def _drain(self) -> None:
        """Until the committer has tidied up: its tasks are run one after the other."""
        done = threading.Event()
        self.run._committer._pool.submit(done.set)
        assert done.wait(30)

    def suffer(self, *faults: Fault) -> bool:
        """Save until these faults have happened, and check; False where they were not met."""
        before = set(leftovers(self.path))
        self.ops.arm(*faults)
        for attempt in range(1, _PHASES * self._life + 1):
            error = self.save()
            if self.ops.hits:
                break
            # what changes when is shifted against the chain of differences
            self.generation += attempt % self._life == 0
        hits = self.ops.hits
        self.ops.arm()
        # that the file system has none is remembered: later faults are to meet links again
        self.run._store.links, self.run._store.reflinks = self._links
        self.faults += bool(hits)
        self.failures += error is not None
        self.unmet += not hits
        what = " and ".join(map(str, faults))
        try:
            assert error is None or isinstance(error, AsyncCkptError), f"an untyped error: {error!r}"
            left = set(leftovers(self.path)) - before
            excused = isinstance(error, DurabilityUnknown) or _spoils_tidying(hits, saved=error is None)
            assert not left or excused, f"not reclaimed: {left}"
            self.check()
            assert self.save() is None, "the next save fails too, though the fault is gone"
        except AssertionError as failed:
            raise AssertionError(f"{self.scenario}: {what}: {failed} (the save: {error!r})") from failed
        return bool(hits)

    def check(self) -> None:
        visible = check_visible(self.path)
        kept = sorted(self.durable)[-1:] if "retention" in self.scenario.name else sorted(self.durable)[-2:]
        for step in kept:
            assert step in visible, f"step {step} was acknowledged and is gone"
            assert visible[step] >= self.durable[step], f"step {step} is generation {visible[step]}"
        for step, generation in visible.items():
            known = generation in (self.durable.get(step), self.undecided.get(step))
            assert known, f"step {step}, generation {generation}: its save failed, and it is there"
        self._forget_undecided(visible)
        assert_all_memory_came_back(self.run._arena)
        if hasattr(self, "_threads"):
            deadline = time.monotonic() + 5  # a thread that has told that it is done is gone a moment later
            while extra := {thread.name for thread in threading.enumerate()} - self._threads:
                assert time.monotonic() < deadline, f"threads left: {extra}"
                time.sleep(0.001)
            if self._open() != self._files:
                gc.collect()
            assert self._open() == self._files, "descriptors left open"

    def _forget_undecided(self, visible: dict[int, int]) -> None:
        """They are looked at once more, and go: a run keeps them as evidence, and each check reads all there is."""
        newest = max(self.durable)
        for step in [step for step in self.undecided if step < newest and step in visible]:
            shutil.rmtree(self.path / f"step-{step:08d}")
            del self.undecided[step]

    def _open(self) -> list[str]:
        """Of this run; not the lease's next record, which its holder may be writing."""
        ours = (target for target in open_files().values() if target.startswith(str(self.path)))
        return sorted(target for target in ours if ".tmp-lease-" not in target)

    def close(self) -> None:
        self.run.close()
        with self.scenario.checkpointer(self.path) as after:
            after.prepare(state_of(1))
            assert leftovers(self.path) == [], "the next run did not reclaim what was left"
        check_visible(self.path)


def faults_at(site: Site) -> list[Fault]:
    """Everything that can go wrong there."""
    kinds = {
        "before": () if site.operation in ("close", "close_read") else ERRORS,
        "half": LATE if site.operation in HALVES else (),
        "after": () if site.operation in NEVER_LATE else LATE,
        "delay": (0,),
        "short": (0,) if site.operation == "pwrite" else (),
    }
    return [
        Fault(site, kind, code, persistent)
        for kind, codes in kinds.items()
        for code in codes
        for persistent in (False, True)
    ]


def _endure(ordeal: Ordeal, faults: Sequence[tuple[Fault, ...]]) -> None:
    """All of them, past the first that does harm: hours of them are not worth one line."""
    harm: list[str] = []
    try:
        for several in faults:
            try:
                ordeal.suffer(*several)
            except AssertionError as failed:
                harm.append(str(failed))
                print(f"HARM: {failed}", flush=True)
                if len(harm) == _ENOUGH:
                    break
    finally:
        ordeal.close()
    assert not harm, f"{len(harm)} did harm: " + "\n".join(harm)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=str)
def test_an_error_at_a_site_loses_nothing(scenario: Scenario, tmp_path: Path) -> None:
    """One error at each of a few sites, and a few pairs; the slow tests try all."""
    rng = random.Random(str(scenario))
    ordeal = Ordeal(tmp_path / "run", scenario)
    sites = ordeal.sites()
    data = next(site for site in sites if site.operation == "pwrite")
    faults = [(Fault(data, "before", errno.EIO),)]  # whatever is drawn, one save fails
    faults += [(rng.choice(faults_at(site)),) for site in rng.sample(sites, 17)]
    faults += [
        (rng.choice(faults_at(a)), rng.choice(faults_at(b))) for a, b in [rng.sample(sites, 2) for _ in range(3)]
    ]
    _endure(ordeal, faults)
    assert ordeal.faults > 14
    assert ordeal.failures > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=str)
def test_every_error_at_every_site_loses_nothing(scenario: Scenario, tmp_path: Path) -> None:
    ordeal = Ordeal(tmp_path / "run", scenario)
    sites = ordeal.sites()
    _endure(ordeal, [(fault,) for site in sites for fault in faults_at(site)])
    print(
        f"{scenario}: {len(sites)} sites, {ordeal.faults} faults, {ordeal.failures} failed saves, {ordeal.unmet} unmet"
    )
    assert ordeal.unmet <= ordeal.faults // 20


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=str)
def test_errors_at_every_pair_of_sites_lose_nothing(scenario: Scenario, tmp_path: Path) -> None:
    rng = random.Random(str(scenario))
    ordeal = Ordeal(tmp_path / "run", scenario)
    pairs = list(itertools.combinations(ordeal.sites(), 2))
    most = count("FAULT_PAIRS", 150)
    chosen = pairs if most < 0 else rng.sample(pairs, min(most, len(pairs)))
    _endure(ordeal, [(rng.choice(faults_at(a)), rng.choice(faults_at(b))) for a, b in chosen])
    print(f"{scenario}: {len(chosen)} of {len(pairs)} pairs of sites, {ordeal.failures} failed saves")
