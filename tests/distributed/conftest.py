"""The processes that all distributed tests share."""

from collections.abc import Iterator

import pytest

from tests.distributed.world import World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Eight processes; work on fewer leaves the others idle."""
    processes = World()
    yield processes
    processes.close()
