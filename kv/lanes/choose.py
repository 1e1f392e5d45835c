"""Which lane leads into a pool: its owner offers some ways, best first, and the writer takes the first it can go."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from callboard.kv.device_store import DeviceStore
from callboard.kv.layout import KvLayout
from callboard.kv.packed_form import packed_bytes
from callboard.kv.page_store import PageStore
from callboard.kv.pool_socket import WrongPool, fetch_pool

from .contract import Lane
from .cuda_ipc import CudaIpcLane
from .mapped import MappedLane
from .pace import Pace
from .packed import PackedLane
from .wire import Announce, Wires

INPROC = "inproc:"
"""Prefix of the path of a pool that is found in the node's exchange instead of behind a socket."""
KINDS = ("inproc", "cuda_ipc", "shm", "ucx")
"""Every kind of lane, best first."""
MAPPED = ("inproc", "cuda_ipc", "shm")
"""Those on which the writer writes into the pool itself."""


class LaneOffer(msgspec.Struct, frozen=True, array_like=True):
    """A way into a pool. ``address``: a socket's path, or host and port. ``secret``: to be shown there first."""

    kind: str
    address: str
    secret: bytes = b""
    machine: str = ""
    """Where it can be taken from: only there, or anywhere if empty."""
    dtype: str = ""
    """What pages are to be packed as; the pool's own if empty."""


def machine_id() -> str:
    """Return what tells this machine, since it was booted, from all others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def usable_lanes(transport: str, wires: Wires, gpu: str = "") -> tuple[str, ...]:
    """Return the kinds of lanes that lead from and into a pool here, best first; ``gpu``: the one it is on, if any.

    All but ``transport`` are ruled out unless it is "auto".
    """
    usable = KINDS if wires.is_usable else MAPPED
    ruled_out = ("inproc", "shm") if gpu else ("cuda_ipc",)
    return tuple(kind for kind in usable if kind not in ruled_out and transport in ("auto", kind))


def is_mappable(kind: str, *, is_near: bool, gpus: tuple[str, str]) -> bool:
    """Return whether a pool can be mapped for a lane of that kind: on one machine, and for cuda_ipc on one GPU.

    ``gpus`` are those that the two pools are on, empty for host memory.
    """
    if kind == "cuda_ipc":
        return is_near and gpus[0] == gpus[1] != ""
    return is_near and kind == "shm" and not any(gpus)


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
    if isinstance(store, DeviceStore):
        return CudaIpcLane("cuda_ipc", store, is_owner=True)
    return MappedLane("inproc" if is_here else "shm", store, is_owner=not is_here, pace=pace)


def open_own_lane(store: PageStore, pace: Pace) -> Lane:
    """Open the lane inside a manager's own pool, for what cannot change hands by the block."""
    if isinstance(store, DeviceStore):
        return CudaIpcLane("pool", store, is_owner=False)
    return MappedLane("pool", store, is_owner=False, pace=pace)


async def open_wire_lane(
    offer: LaneOffer, wires: Wires, announce: Announce, *, layout: KvLayout, on_break: Callable[[], object]
) -> Lane:
    """Open the lane over a wire that was offered, into a pool of ``layout``.

    Raises WireBroken, WiresMissing, and ValueError for a dtype that nothing can be packed as.
    """
    dtype = offer.dtype or layout.dtype
    packed_bytes(layout, 1, 1, dtype)
    wire = await wires.connect(offer.address, offer.secret)
    return PackedLane(offer.kind, wire, announce, dtype=dtype, new_tag=wires.new_tag, on_break=on_break)
