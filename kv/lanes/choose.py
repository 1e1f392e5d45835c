"""Which lane leads into a pool: its owner offers some ways, best first, and the writer takes the first it can go."""

from typing import Any

import msgspec

from callboard.kv.layout import KvLayout
from callboard.kv.page_store import PageStore
from callboard.kv.pool_socket import WrongPool, fetch_pool

from .contract import Lane
from .mapped import MappedLane
from .pace import Pace

INPROC = "inproc:"
"""Prefix of the path of a pool that is found in the node's exchange instead of behind a socket."""
KINDS = ("inproc", "cuda_ipc", "shm", "ucx")
"""Every kind of lane, best first."""


class LaneOffer(msgspec.Struct, frozen=True, array_like=True):
    """A way into a pool. ``address``: a socket's path, or host and port. ``secret``: to be shown there first."""

    kind: str
    address: str
    secret: bytes = b""
    machine: str = ""
    """Where it can be taken from: only there, or anywhere if empty."""


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
    """Open the lane into a pool that can be mapped here. Raises as open_pool does, WrongPool for a layout without
    exchange."""
    is_here = pool_path.startswith(INPROC)
    store = await open_pool(pool_path, exchange, epoch=epoch)
    if layout is not None and not store.layout.can_exchange_with(layout):
        if not is_here:
            store.close()
        raise WrongPool(f"{pool_path} hands out a pool of another layout")
    return MappedLane("inproc" if is_here else "shm", store, is_owner=not is_here, pace=pace)
