"""How a copy shares the event loop with everything else."""

import asyncio
from collections.abc import Callable
from random import Random

from callboard.kv.layout import KvLayout
from callboard.kv.page_store import PIECE_BYTES

PAGE_S = (20e-6, 200e-6, 2e-3)
"""What a page takes in simulation, in the mean: over a fast lane, or a slow one."""


class Pace:
    """A piece at a time."""

    def piece_bytes(self, layout: KvLayout) -> int:
        """Return the most bytes that are copied at a time."""
        return PIECE_BYTES

    async def take(self, copy: Callable[[], int]) -> int:
        """Copy a piece, and let the loop run; return what ``copy`` returned."""
        num_bytes = copy()
        await asyncio.sleep(0)
        return num_bytes


class SimulatedPace(Pace):
    """Pages that take time: on a virtual clock anything may happen between two pieces, and inside a page too."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._page_s = rng.choice(PAGE_S)

    def piece_bytes(self, layout: KvLayout) -> int:
        # No divisor of a page: pieces end inside of blocks and slots, as those of a stopped memcpy do.
        return max(1, layout.block_size * layout.slot_bytes * 5 // 7)

    async def take(self, copy: Callable[[], int]) -> int:
        loop = asyncio.get_running_loop()
        copied: asyncio.Future[int] = loop.create_future()
        # In the timer's own callback: a process that was stopped in a copy goes on with that before it hears anything.
        loop.call_later(self._rng.uniform(0.0, 2 * self._page_s), _copy_into, copied, copy)
        return await copied


def _copy_into(copied: asyncio.Future[int], copy: Callable[[], int]) -> None:
    if not copied.cancelled():
        try:
            copied.set_result(copy())
        except Exception as error:
            copied.set_exception(error)
