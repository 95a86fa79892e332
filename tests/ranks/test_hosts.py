"""Ranks on several hosts, as far as one machine can show: each in a network namespace with an address of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.harness import Crew, Crews, Me
from support.options import by_stage
from support.parallelisms import SIZES, TIMEOUT, hash_of
from support.sharded_states import build, contents, scramble

import asyncckpt


def _ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], check=False, capture_output=True).returncode == 0


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str]]]:
    """Two namespaces, 10.77.0.1 and 10.77.0.2, joined by a cable: names, and their interfaces."""
    names = [f"asyncckpt-{os.getpid()}-{side}" for side in "ab"]
    wires = [f"ac{os.getpid() % 100000}{side}" for side in "ab"]
    made = shutil.which("ip") is not None and all(_ip("netns", "add", name) for name in names)
    made = made and _ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
    for number, (name, wire) in enumerate(zip(names, wires, strict=True), 1):
        made = made and _ip("link", "set", wire, "netns", name)
        made = made and _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", wire)
        made = made and _ip("-n", name, "link", "set", wire, "up") and _ip("-n", name, "link", "set", "lo", "up")
    try:
        if not made:
            pytest.skip("network namespaces cannot be made here (`ip netns add` and veth need root)")
        yield list(zip(names, wires, strict=True))
    finally:
        for name in names:
            _ip("netns", "del", name)


def _addresses(me: Me) -> list[str]:
    found = subprocess.run(["ip", "-br", "-4", "addr"], check=True, capture_output=True, text=True).stdout
    return [word for line in found.splitlines() for word in line.split()[2:] if not word.startswith("127.")]


def _save_and_restore(me: Me, path: str, way: str) -> str:
    state = build(way, me.rank, me.size)
    expected = contents(state)
    with asyncckpt.Checkpointer(path, **by_stage(ranks=TIMEOUT, **SIZES)) as run:
        report = run.save(1, state).result(60)
        scramble(state)
        assert run.resume(state) == 1
    found = contents(state)
    assert {name for name in expected if found[name] != expected[name]} <= {"rng/torch"}  # drawn from since
    return hash_of(report.path) if me.rank == 0 else ""


def test_ranks_with_addresses_of_their_own_save_and_restore_together(
    hosts: list[tuple[str, str]], crews: Crews, tmp_path: Path
) -> None:
    (tmp_path / "alone").mkdir()
    alone = crews(1).values(_save_and_restore, str(tmp_path / "alone" / "run"), "ddp")[0]
    spaces = [hosts[0], hosts[0], hosts[1], hosts[1]]
    crews.leave_room(4)
    with Crew(4, store="rank0", spaces=spaces, address="10.77.0.1") as crew:
        addresses = crew.values(_addresses)
        assert addresses == [["10.77.0.1/24"]] * 2 + [["10.77.0.2/24"]] * 2
        for way in ("ddp", "fsdp2", "hsdp"):
            found = crew.values(_save_and_restore, str(tmp_path / way), way)
            assert found[0] == alone
