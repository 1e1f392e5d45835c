"""What the directory hears of a KV manager: how full its pool is, what it has done, and its ways to others."""

from collections.abc import Callable

from callboard.actors.protocol import Counters, Entry, Load

from .pool_actor import PoolActor
from .tiering import Tiering

REPORT_S = 0.2
"""How often the directory hears of the load."""
MOST_DETAIL = 1000
"""Characters of the lanes that the directory is told of."""


async def report(manager: PoolActor, tiers: Tiering, lanes: Callable[[], dict[str, str]]) -> None:
    """Keep the directory's entry, and the load in it, fresh."""
    from callboard.actors.registration import Registration  # It needs no KV manager, but a fleet.

    entry = Entry(manager.name, "kv_manager", manager.ref.address, device=manager.config.device, load=load_of(manager))
    registration = Registration(manager, entry)
    while True:
        await manager.node.clock.sleep(REPORT_S)
        words = ", ".join(f"{peer}: {lane}" for peer, lane in sorted(lanes().items()))
        detail = {"lanes": words[:MOST_DETAIL]} if words else {}
        registration.update(load=load_of(manager), counters=tiers.counted(counters_of(manager)), detail=detail)


def load_of(manager: PoolActor) -> Load:
    """Return where the blocks of a manager's pool are."""
    blocks = manager.blocks
    return Load(
        free_blocks=blocks.allocator.num_available,
        num_blocks=manager.config.num_blocks,
        cached_blocks=blocks.cache.num_idle,
        quarantined_blocks=blocks.num_quarantined,
    )


def counters_of(manager: PoolActor) -> Counters:
    """Return what a manager's pool and its sender have done."""
    cache = manager.blocks.cache
    return Counters(
        num_queried_tokens=cache.num_queried_tokens,
        num_hit_tokens=cache.num_hit_tokens,
        num_evicted_blocks=cache.num_evicted,
        num_bytes_sent=manager.num_bytes_sent,
    )
