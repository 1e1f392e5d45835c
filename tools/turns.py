"""Turns: of those who do something to the same thing, one at a time, in the order in which they came."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager


class Turns:
    """Locks by name, which are there as long as anybody has one or waits for it."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._num_users: dict[str, int] = {}

    @asynccontextmanager
    async def of(self, *names: str) -> AsyncIterator[None]:
        """Have the turn of all of ``names``. Who has one may ask for those of others that come later in order."""
        async with AsyncExitStack() as stack:
            for name in sorted(set(names)):
                await stack.enter_async_context(self._turn(name))
            yield

    @asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[None]:
        lock = self._locks.setdefault(name, asyncio.Lock())
        self._num_users[name] = self._num_users.get(name, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._num_users[name] -= 1
            if not self._num_users[name]:
                del self._num_users[name], self._locks[name]
