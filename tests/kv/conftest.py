"""Two KV managers and their engines, on the real clock."""

from collections.abc import AsyncIterator

import pytest
from two_managers import Fleet, running


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with running() as fleet:
        yield fleet
