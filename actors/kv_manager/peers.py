"""The ties to other KV managers: one standing tie, and one lane, for each manager that is sent to.

When the receiving manager dies, its lane is closed, also under those who write. The other side is writers.py.
"""

import asyncio

from callboard.actors.protocol import Tie
from callboard.bus import FOREVER, Address, BusError, LinkLost, Ref
from callboard.bus.calls import enter_call
from callboard.kv.lanes import Lane, open_lane
from callboard.kv.layout import StaleReservation
from callboard.kv.pool_socket import WrongPool

from .pool_actor import PoolActor


class Peer:
    """A tie to one (manager, epoch). ``lane`` is set once it stands."""

    def __init__(self, ref: Ref) -> None:
        self.ref = ref
        self.ready: asyncio.Future[Lane] = asyncio.get_running_loop().create_future()


class Peers:
    """Every tie of one manager. Its tasks belong to the manager."""

    def __init__(self, manager: PoolActor) -> None:
        self._manager = manager
        self._peers: dict[tuple[str, str, str], Peer] = {}

    def lanes(self) -> dict[str, str]:
        """Return the lanes that stand, by the name of the manager they lead to."""
        ready = {key: peer.ready for key, peer in self._peers.items() if peer.ready.done()}
        return {actor: each.result().name for (_, actor, _), each in ready.items() if not each.exception()}

    async def enter(self, address: Address, epoch: str) -> Peer:
        """Return the tie to a manager, made now if there is none.

        Raises StaleReservation, and what the bus says of a manager that cannot be reached.
        """
        key = _key(address, epoch)
        peer = self._peers.get(key)
        if peer is None:
            peer = self._peers[key] = Peer(self._manager.node.ref(address))
            self._manager.spawn(self._keep(peer, address, epoch))
        # Shielded: several senders may wait for the same tie.
        await asyncio.shield(peer.ready)
        return peer

    async def _keep(self, peer: Peer, address: Address, epoch: str) -> None:
        """Hold the tie until it breaks."""
        enter_call(None)  # It outlives the call that it was made for.
        node = self._manager.node
        error: BusError | None = None
        try:
            async with peer.ref.stream(Tie(epoch, self._manager.ref.address), timeout=FOREVER) as items:
                async for item in items:
                    if peer.ready.done():
                        raise LinkLost(f"{address} tied itself twice")
                    layout, pace = self._manager.config.layout, self._manager.pace(address.actor)
                    lane = await open_lane(item.pool_path, node.exchange, epoch=epoch, layout=layout, pace=pace)
                    peer.ready.set_result(lane)
        except BusError as broken:
            error = broken
        except WrongPool as broken:
            error = StaleReservation(reservation_id="", reason=str(broken))
        except (OSError, ValueError) as broken:
            error = LinkLost(f"the pool of {address} is out of reach: {broken}")
        finally:
            self._peers.pop(_key(address, epoch), None)
            if not peer.ready.done():
                peer.ready.set_exception(error or LinkLost(f"no tie to {address}"))
                peer.ready.exception()  # Nobody may be waiting for it.
            elif not peer.ready.exception():
                # Also under a write: the next manager of that device may have the same memory, and lend it anew.
                peer.ready.result().close()


def _key(address: Address, epoch: str) -> tuple[str, str, str]:
    """Name a manager by where it is: under other names of its node it is the same, and tied already."""
    return address.endpoint or address.node, address.actor, epoch
