"""Lanes: how pages get from one pool into another, behind one contract.

A lane belongs to one (manager, epoch) and is opened once for it. A write is over when ``write`` returns or raises:
nothing of it touches the target afterwards. That is what lets a reservation be closed by message.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from .layout import SlotRun
from .page_store import PageStore, copy_slots
from .pool_socket import fetch_pool
from .slots import SlotCopy

INPROC = "inproc:"
"""Prefix of the path of a pool that is found in the node's exchange instead of behind a socket."""


class LaneClosed(Exception):
    """The peer's pool is given up: what is written now would be of use to nobody, and may be somebody else's."""


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

    def __init__(self, name: str, target: PageStore, *, is_owner: bool) -> None:
        self.name = name
        self._target = target
        self._is_owner = is_owner
        self._is_closed = False

    async def write(self, source: PageStore, copies: Sequence[SlotCopy], layers: range) -> int:
        # On the loop, in pieces: a thread would hold the interpreter's lock just as long, and could not be stopped.
        num_bytes = 0
        pieces = copy_slots(source, self._target, copies, layers)
        while not self._is_closed and not self._target.is_closed:
            moved = next(pieces, None)
            if moved is None:
                return num_bytes
            num_bytes += moved
            await asyncio.sleep(0)
        raise LaneClosed

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


async def open_lane(pool_path: str, exchange: dict[str, Any] | None, *, epoch: str) -> Lane:
    """Open the lane into the pool behind ``pool_path``. Raises as open_pool does."""
    is_here = pool_path.startswith(INPROC)
    store = await open_pool(pool_path, exchange, epoch=epoch)
    return MappedLane("inproc" if is_here else "shm", store, is_owner=not is_here)
