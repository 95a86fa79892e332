"""A server and a client of each version of NFS, for each file of tests: a crash of one is not the next one's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from machines import Machines


@pytest.fixture(scope="module", params=["3", "4.2"], ids=["v3", "v4.2"])
def machines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    machines = Machines(tmp_path_factory.mktemp("nfs"), request.param)
    try:
        machines.client.call("ready")
        yield machines
    finally:
        machines.close()
        print(f"NFS v{machines.version}: {machines.boots} boots")
