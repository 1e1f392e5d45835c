"""Buffers that pages wait in on their way over a wire: they belong to the transport, so no pool is ever read or
written by it."""

import asyncio
import mmap
from collections import deque

from .contract import LaneClosed


class Staging:
    """At most ``num_buffers`` buffers of ``num_bytes``, lent one at a time; each is made when it is first needed."""

    def __init__(self, num_buffers: int, num_bytes: int) -> None:
        self.num_lent = 0
        self._num_buffers = num_buffers
        self._num_bytes = num_bytes
        self._free: list[memoryview] = []
        self._num_made = 0
        self._waiting: deque[asyncio.Future[memoryview]] = deque()
        self._is_closed = False

    async def take(self) -> memoryview:
        """Lend a buffer, to whoever asked first. Raises LaneClosed."""
        if self._is_closed:
            raise LaneClosed
        if self._free or self._num_made < self._num_buffers:
            self.num_lent += 1
            return self._free.pop() if self._free else self._make()
        waiter: asyncio.Future[memoryview] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and not waiter.exception():
                self.give(waiter.result())
            raise

    def give(self, buffer: memoryview) -> None:
        """Take a buffer back. Nobody reads or writes it any more."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(buffer)
                return
        self.num_lent -= 1
        if not self._is_closed:
            self._free.append(buffer)

    def close(self) -> None:
        """Lend no more; those who wait hear LaneClosed. What is lent goes when it is given back."""
        self._is_closed = True
        self._free.clear()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(LaneClosed())
        self._waiting.clear()

    def _make(self) -> memoryview:
        self._num_made += 1
        # Whole pages of their own: what a network card wants, and what numpy copies fastest into.
        return memoryview(mmap.mmap(-1, self._num_bytes))
