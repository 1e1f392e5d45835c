"""What is done about blocks that stay in quarantine: who keeps too many for too long is killed, by the launcher.

A writer out of reach (stopped, or hanging) may go on at any time, so nothing but its death gives its blocks back. A few
are no matter; a pool full of them serves nobody.
"""

import logging

from .pool_actor import PoolActor
from .writers import SELF, Writers

SHARE = 0.25
"""The most of a pool that may be in quarantine for long."""
NUM_LEASES = 3
"""For how many leases."""

log = logging.getLogger("callboard.kv_manager")


async def watch_quarantine(manager: PoolActor, writers: Writers) -> None:
    """Ask for the end of those who keep the most, until what is left is within the share."""
    lease_s, num_blocks, clock = manager.config.lease_s, manager.config.num_blocks, manager.node.clock
    most = SHARE * num_blocks
    since: dict[str, float] = {}
    """When each writer in quarantine was first seen there."""
    while True:
        await clock.sleep(lease_s / 2)
        now, blocks = clock.now(), manager.blocks
        kept = blocks.quarantined_by()
        kept.pop(SELF, None)  # It is alive, and about to end.
        since = {incarnation: since.get(incarnation, now) for incarnation in kept}
        left = blocks.num_quarantined
        nodes = {**writers.nodes(), **blocks.lost_nodes()}
        for incarnation in sorted(kept, key=lambda each: kept[each], reverse=True):
            if left <= most:
                break
            left -= kept[incarnation]
            if now - since[incarnation] < NUM_LEASES * lease_s:
                continue
            since[incarnation] = now  # One that cannot be killed from here is asked for again after as long.
            why = f"it is out of reach and keeps {kept[incarnation]} of {num_blocks} blocks of {manager.name}"
            node = nodes.get(incarnation)
            if node is None or manager.ask_to_kill is None:
                log.warning("nobody can be asked to kill %s: %s", node or incarnation, why)
            else:
                manager.ask_to_kill(node, incarnation, why)
