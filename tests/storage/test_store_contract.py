"""Every storage backend keeps the contract that is shipped for backends of others; so do the doubles that tests use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from asyncckpt.protocols import Store
from asyncckpt.storage import open_store
from asyncckpt.storage.local import LocalStore
from asyncckpt.storage.memory import MemoryBucket, MemoryStore
from asyncckpt.testing import FaultyOps, InterceptedOps, RecordingOps, SlowOps, ThrottledOps
from asyncckpt.testing.contracts import StoreContract

DOUBLES: dict[str, Callable[[str], LocalStore]] = {
    "as it is": LocalStore,
    "through the page cache": lambda path: LocalStore(path, direct=False),
    "intercepted": lambda path: LocalStore(path, ops=InterceptedOps()),
    "recorded": lambda path: LocalStore(path, ops=RecordingOps(path)),
    "slow": lambda path: LocalStore(path, ops=SlowOps(0.0001)),
    "throttled": lambda path: LocalStore(path, ops=ThrottledOps(1e9)),
    "faulty": lambda path: LocalStore(path, ops=FaultyOps()),
}


@pytest.mark.parametrize("kind", DOUBLES)
class TestLocalStore(StoreContract):
    @pytest.fixture(autouse=True)
    def _choose(self, kind: str, tmp_path: Path) -> None:
        self._make = DOUBLES[kind]
        self._path = str(tmp_path / "run")

    def store(self) -> Store:
        return self._make(self._path)


class TestMemoryStore(StoreContract):
    """It has none of the capabilities: what it passes is what every backend has to do."""

    @pytest.fixture(autouse=True)
    def _choose(self) -> None:
        self._bucket = MemoryBucket()

    def store(self) -> Store:
        return MemoryStore(self._bucket)


class TestAddress(StoreContract):
    @pytest.fixture(autouse=True)
    def _choose(self, tmp_path: Path) -> None:
        self._address = f"file://{tmp_path}/run"

    def store(self) -> Store:
        return open_store(self._address)
