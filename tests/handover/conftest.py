"""Hand-overs on a virtual clock."""

import asyncio
from collections.abc import Callable

from callboard.bus.testing import VirtualLoop


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"virtual": VirtualLoop}
