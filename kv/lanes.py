"""Lanes: how pages get from one pool into another, behind one contract.

A lane belongs to one (manager, epoch) and is opened once for it. A write is over when ``write`` returns or raises:
nothing of it touches the target afterwards. That is what lets a reservation be closed by message.
"""

import asyncio
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Protocol

from .layout import KvLayout, SlotRun
from .page_store import PIECE_BYTES, PageStore, copy_slots
from .pool_socket import WrongPool, fetch_pool
from .slots import SlotCopy

INPROC = "inproc:"
"""Prefix of the path of a pool that is found in the node's exchange instead of behind a socket."""
PAGE_S = (20e-6, 200e-6, 2e-3)
"""What a page takes in simulation, in the mean: over a fast lane, or a slow one."""


class LaneClosed(Exception):
    """The peer's pool is given up: what is written now would be of use to nobody, and may be somebody else's."""


class Pace:
    """How a copy shares the event loop: a piece at a time."""

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


class Lane(Protocol):
    """A way into one peer's pool. ``name`` is shown to people."""

    name: str

    async def write(self, source: PageStore, copies: Sequence[SlotCopy], layers: range) -> int:
        """Write slots of a group of layers from ``source``; return the bytes moved, once they are in place.

        When it is cancelled, it returns only after the last byte that it will ever write. Raises LaneClosed when
        the lane is closed meanwhile.
        """

    def fits(self, runs: Sequence[SlotRun]) -> bool:
        """Return whether the peer's pool has all these slots."""

    def close(self) -> None:
        """Give up what the lane holds, also under a write. A repeat does nothing."""


class MappedLane:
    """A peer's pool mapped into this process: one copy, straight into place (``shm``, ``inproc``)."""

    def __init__(self, name: str, target: PageStore, *, is_owner: bool, pace: Pace | None = None) -> None:
        self.name = name
        self._target = target
        self._pace = pace or Pace()
        self._is_owner = is_owner
        self._is_closed = False

    async def write(self, source: PageStore, copies: Sequence[SlotCopy], layers: range) -> int:
        # On the loop, in pieces: a thread would hold the interpreter's lock just as long, and could not be stopped.
        num_bytes = 0
        pieces = copy_slots(source, self._target, copies, layers, piece_bytes=self._pace.piece_bytes(source.layout))

        def copy() -> int:
            if self._is_closed or self._target.is_closed:
                raise LaneClosed
            return next(pieces, 0)

        while moved := await self._pace.take(copy):
            num_bytes += moved
        return num_bytes

    def fits(self, runs: Sequence[SlotRun]) -> bool:
        return all(0 <= run.slot <= self._target.num_slots - run.count and run.count > 0 for run in runs)

    def close(self) -> None:
        self._is_closed = True
        if self._is_owner:
            self._target.close()


async def open_pool(pool_path: str, exchange: dict[str, Any] | None, *, epoch: str | None = None) -> PageStore:
    """Map the pool behind ``pool_path``. Raises OSError if it is gone, WrongPool if it is another epoch's.

    A pool from the exchange is its owner's: do not close it.
    """
    if not pool_path.startswith(INPROC):
        return await fetch_pool(pool_path, epoch=epoch)
    store = (exchange or {}).get(pool_path)
    if not isinstance(store, PageStore):
        raise FileNotFoundError(f"there is no pool {pool_path} in this process")
    return store


async def open_lane(
    pool_path: str,
    exchange: dict[str, Any] | None,
    *,
    epoch: str,
    layout: KvLayout | None = None,
    pace: Pace | None = None,
) -> Lane:
    """Open the lane into the pool behind ``pool_path``. Raises as open_pool does, WrongPool for another layout."""
    is_here = pool_path.startswith(INPROC)
    store = await open_pool(pool_path, exchange, epoch=epoch)
    if layout is not None and store.layout != layout:
        if not is_here:
            store.close()
        raise WrongPool(f"{pool_path} hands out a pool of another layout")
    return MappedLane("inproc" if is_here else "shm", store, is_owner=not is_here, pace=pace)
