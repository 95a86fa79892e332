"""Power losses on real file systems: whatever a disk lost since its last flush, what was acknowledged is there.

Every write and flush of a run is recorded below ext4, XFS or btrfs. For each power loss the disk is made what it would
be then; the file system recovers when it is mounted, and the run's checkpoints are looked at.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from support.scenarios import SCENARIOS, Scenario, check_visible, count, state_of

from asyncckpt.storage.posix import PosixOps
from asyncckpt.testing import blockdevice
from asyncckpt.testing.blockdevice import Epoch, Image, RecordingDevice, epochs, loop_device, losses, mounted, replay

#: Files below are in memory where there is such a place: the disk's speed is not what is tried.
MEMORY = Path("/dev/shm")
SAVES = 4
#: Every so many power losses the run goes on after the recovery, and saves once more.
GO_ON_EVERY = 10


@dataclass(frozen=True)
class FileSystem:
    kind: str
    mib: int
    mkfs: tuple[str, ...]
    target: int
    """Power losses that ``make faults`` tries."""
    options: str = ""

    def __str__(self) -> str:
        return self.kind


EXT4 = FileSystem("ext4", 48, ("mkfs.ext4", "-q", "-F", "-O", "has_journal", "-E", "lazy_itable_init=0"), 5000)
XFS = FileSystem("xfs", 304, ("mkfs.xfs", "-q", "-f", "-K"), 1000)
BTRFS = FileSystem("btrfs", 128, ("mkfs.btrfs", "-q", "-f", "-K"), 2000)


@dataclass
class Tally:
    tried: Counter[str] = field(default_factory=Counter)
    continued: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(self.tried.items()))
        return (
            f"{self.tried.total()} power losses ({kinds}); {self.continued} runs went on after one; "
            f"{len(self.wrong)} with something lost or torn"
        )


def _available(system: FileSystem) -> None:
    reason = blockdevice.reason_unavailable(system.mkfs[0])
    if reason is None and system.kind not in Path("/proc/filesystems").read_text().split():
        reason = f"this kernel has no {system.kind}"
    if reason is not None:
        pytest.skip(reason)


class Unsynced(PosixOps):
    """A planted bug: no file and no directory is ever synced."""

    def fsync(self, fd: int) -> None:
        return None

    def fsync_directory(self, path: str) -> None:
        return None


@dataclass(frozen=True)
class Recording:
    """A run on a file system: the disk before it, and what was done to it."""

    system: FileSystem
    scenario: Scenario
    initial: Image
    cut: list[Epoch]


def _record(system: FileSystem, scenario: Scenario, folder: Path, ops: PosixOps | None = None) -> Recording:
    """Format, run some saves, and keep what the disk was told."""
    image = folder / "image"
    with open(image, "wb") as file:
        file.truncate(system.mib << 20)
    subprocess.run([*system.mkfs, str(image)], check=True, capture_output=True)
    (folder / "mounted").mkdir()
    with loop_device(image) as device, mounted(device, folder / "mounted", system.kind, system.options) as root:
        (root / "run").mkdir()  # a file system that has been used
    initial = np.fromfile(image, np.uint8)
    with (
        RecordingDevice(image, folder) as device,
        mounted(device.path, folder / "mounted", system.kind, system.options) as root,
    ):
        run = scenario.checkpointer(root / "run")
        if ops is not None:
            run._store.ops = ops
        with run:
            for generation in range(1, SAVES + 1):
                run.save(scenario.step(generation), state_of(generation)).result()
                device.mark(str(generation))
        device.mark("end")  # what unmounting writes is no part of the run
    return Recording(system, scenario, initial, _until_the_end(epochs(device.records())))


def _until_the_end(cut: list[Epoch]) -> list[Epoch]:
    last = next(number for number, epoch in enumerate(cut) if any(text == "end" for text, _ in epoch.marks))
    return cut[: last + 1]


def _mapped(file: Path, nbytes: int) -> Image:
    with open(file, "wb") as opened:
        opened.truncate(nbytes)
    return np.memmap(file, np.uint8, "r+")


def _try(recording: Recording, number: int, folder: Path, seed: int, give_up_after: int = 10) -> Tally:
    """Lose power ``number`` times, and look at what is left each time."""
    rng = random.Random(seed)
    tally = Tally()
    system, scenario = recording.system, recording.scenario
    chosen = losses(recording.cut, number, rng)
    initial = recording.initial.copy()
    (folder / "recovered").mkdir()
    image = _mapped(folder / "lost", len(initial))
    with loop_device(folder / "lost") as device:
        for loss in replay(initial, recording.cut, chosen, image):
            tally.tried[loss.kind] += 1
            acknowledged = max((int(text) for text in loss.known if text != "end"), default=0)
            try:
                with mounted(device, folder / "recovered", system.kind, system.options) as root:
                    _check(root / "run", scenario, acknowledged)
                    if rng.randrange(GO_ON_EVERY) == 0:
                        _go_on(root / "run", scenario)
                        tally.continued += 1
            except (AssertionError, OSError) as error:
                where = f"epoch {loss.epoch}, {loss.reached} writes, {loss.kind}"
                tally.wrong.append(f"{where}: generation {acknowledged} was acknowledged: {error}")
                if len(tally.wrong) >= give_up_after:
                    break
    return tally


def _check(path: Path, scenario: Scenario, acknowledged: int) -> None:
    visible = set(check_visible(path).values())
    newest = max(visible, default=0)
    assert newest >= acknowledged, f"{newest} is the newest left"
    if newest == acknowledged > 1 and not scenario.options.get("overwrite"):
        assert acknowledged - 1 in visible, "retention keeps two, and one is left"


def _go_on(path: Path, scenario: Scenario) -> None:
    """The next run clears up and saves."""
    before = max(check_visible(path).values(), default=0)
    with warnings.catch_warnings(), scenario.checkpointer(path) as run:
        warnings.simplefilter("ignore")  # it tells of what it found
        run.save(scenario.step(before + 1), state_of(before + 1)).result()
    assert max(check_visible(path).values()) == before + 1


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """An empty folder in memory."""
    if not MEMORY.is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="asyncckpt-", dir=MEMORY))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def test_a_power_loss_on_ext4_loses_nothing(memory: Path) -> None:
    _available(EXT4)
    tally = _try(_record(EXT4, SCENARIOS["safetensors"], memory), 60, memory, seed=1)
    assert tally.wrong == []
    assert tally.tried["torn writes"] > 3


def test_without_syncs_a_power_loss_is_seen_to_lose_checkpoints(memory: Path) -> None:
    """The planted bug: this harness would have seen it."""
    _available(EXT4)
    recording = _record(EXT4, SCENARIOS["safetensors"], memory, Unsynced())
    assert _try(recording, 200, memory, seed=1, give_up_after=1).wrong


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("system", [EXT4, XFS, BTRFS], ids=str)
def test_power_losses_lose_nothing(system: FileSystem, memory: Path) -> None:
    _available(system)
    names = ("safetensors", "links", "zarr-planes", "overwrite")
    wanted = count(f"BLOCK_POINTS_{system.kind.upper()}", system.target // 25)
    for seed, name in enumerate(names):
        folder = memory / name
        folder.mkdir()
        recording = _record(system, SCENARIOS[name], folder)
        writes = sum(len(epoch.writes) for epoch in recording.cut)
        began = time.monotonic()
        tally = _try(recording, -(-wanted // len(names)), folder, seed)
        seconds = time.monotonic() - began
        print(
            f"{system} {name}: {writes} writes, {len(recording.cut) - 1} flushes; {tally}; "
            f"{tally.tried.total() / seconds:.1f} a second"
        )
        assert tally.wrong == []
        shutil.rmtree(folder)
