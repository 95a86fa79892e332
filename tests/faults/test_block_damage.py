"""Blocks and files lost, stale or in the wrong place: ``verify`` sees each, ``restore`` gives no wrong value."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.damaged_files import FORMATS, STEPS, Stored

Spoiling = tuple[str, dict[str, bytes | None]]
BLOCKS = (512, 4096)


def _in_blocks(stored: Stored, earlier: dict[int, dict[str, bytes]]) -> Iterator[Spoiling]:
    for name, data in stored.files.items():
        for size in BLOCKS:
            for at in range(0, len(data), size):
                end = min(at + size, len(data))
                where = f"{name} [{at}:{end}]"
                yield f"zeroed: {where}", {name: data[:at] + bytes(end - at) + data[end:]}
                yield f"cut off at {at}: {name}", {name: data[:at]}
                after = data[end : end + size]
                swapped = data[:at] + after + data[at:end] + data[end + len(after) :]
                yield f"swapped with the next: {where}", {name: swapped}
                for step, files in earlier.items():
                    old = files.get(name, b"")[at:end]
                    yield f"stale, of step {step}: {where}", {name: data[:at] + old + data[at + len(old) :]}


def _between_files(stored: Stored) -> Iterator[Spoiling]:
    for one, other in itertools.combinations(stored.files, 2):
        a, b = stored.files[one], stored.files[other]
        for size in BLOCKS:
            for at in range(0, min(len(a), len(b)), size):
                end = min(at + size, len(a), len(b))
                yield (
                    f"swapped between {one} and {other} [{at}:{end}]",
                    {one: a[:at] + b[at:end] + a[end:], other: b[:at] + a[at:end] + b[end:]},
                )


def _whole_files(stored: Stored, earlier: dict[int, dict[str, bytes]]) -> Iterator[Spoiling]:
    for name, data in stored.files.items():
        yield f"missing: {name}", {name: None}
        yield f"renamed: {name}", {name: None, f"{name}.old": data}
        yield f"in a directory of its own: {name}", {name: None, f"more/{name.rpartition('/')[2]}": data}
        yield f"longer: {name}", {name: data + bytes(512)}
        yield f"empty: {name}", {name: b""}
        yield f"a hole: {name}", {name: bytes(len(data))}
        for step, files in earlier.items():
            if name in files:
                yield f"of step {step}: {name}", {name: files[name]}
    for one, other in itertools.combinations(stored.files, 2):
        yield f"exchanged: {one} and {other}", {one: stored.files[other], other: stored.files[one]}
    for step, files in earlier.items():
        yield (
            f"everything but the manifest of step {step}",
            {name: data for name, data in files.items() if name != "manifest.json" and name in stored.files},
        )
        yield f"the manifest of step {step}", {"manifest.json": files["manifest.json"]}


def _spoilings(stored: Stored) -> Iterator[Spoiling]:
    """Each way to spoil the last checkpoint, without those that change nothing."""
    earlier = {step: stored.read(step) for step in STEPS if step != stored.step}
    for what, changes in itertools.chain(
        _in_blocks(stored, earlier), _between_files(stored), _whole_files(stored, earlier)
    ):
        if any(stored.files.get(name) != data for name, data in changes.items()):
            yield what, changes


def _try(stored: Stored, spoilings: list[Spoiling]) -> None:
    for what, changes in spoilings:
        with stored.spoiled(changes):
            stored.check(what)
        folder = stored.path / "more"
        if folder.is_dir():
            folder.rmdir()
    assert stored.run.verify(stored.step) == [], "a test put something back wrong"


@pytest.mark.parametrize("name", FORMATS)
def test_sampled_block_damage_is_seen_and_never_restored(name: str, tmp_path: Path) -> None:
    stored = Stored(tmp_path / "run", name, 3000)
    kinds: dict[str, list[Spoiling]] = {}
    for what, changes in _spoilings(stored):
        kinds.setdefault(what.split(":")[0].split(" ")[0], []).append((what, changes))
    rng = random.Random(name)
    chosen = [spoiling for several in kinds.values() for spoiling in rng.sample(several, min(10, len(several)))]
    assert len(chosen) > 60
    _try(stored, chosen)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", FORMATS)
def test_all_block_damage_is_seen_and_never_restored(name: str, tmp_path: Path) -> None:
    stored = Stored(tmp_path / "run", name, 6000)
    spoilings = list(_spoilings(stored))
    _try(stored, spoilings)
    print(f"{name}: {len(spoilings)} block and file faults in {sum(map(len, stored.files.values()))} bytes, all seen")
