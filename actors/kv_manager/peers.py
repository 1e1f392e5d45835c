"""The ties between KV managers, from both sides: one standing tie, and one lane, for each manager that is sent to.

While a tie stands, the receiving manager knows that the writer's process lives; when it breaks because that process
died, all its writes are over. When the receiving manager dies, its lane is closed, also under those who write.
"""

import asyncio
from collections.abc import AsyncGenerator

from callboard.actors.protocol import Tie, Tied
from callboard.bus import FOREVER, Address, BusError, Call, LinkLost, Ref
from callboard.bus.calls import enter_call
from callboard.kv.lanes import Lane, open_lane
from callboard.kv.layout import StaleReservation
from callboard.kv.pool_socket import WrongPool

from .pool_actor import PoolActor

SELF = "self"
"""The writer of copies inside a manager's own pool: always heard of."""


class Writers:
    """Serves Tie for one manager: knows which of the processes that write into its pool are alive."""

    def __init__(self, manager: PoolActor) -> None:
        self._manager = manager
        self._incarnations: dict[str, str] = {}

    async def serve(self, call: Call) -> AsyncGenerator[Tied, None]:
        """Stand until the tie breaks; if that proves the writer dead, its writes are over."""
        manager, incarnation = self._manager, call.caller_incarnation
        reservations = manager.blocks.reservations
        before = self._incarnations.get(call.caller)
        if before is not None and before != incarnation:
            reservations.writer_died(before)  # Its node's name has passed to another process.
        self._incarnations[call.caller] = incarnation
        reservations.tie(incarnation)
        manager.changed()
        try:
            yield Tied(manager.pool_path)
            await asyncio.get_running_loop().create_future()
        finally:
            # Leaving the tie on purpose is as good as dying: a writer that stops does not write any more.
            reservations.untie(incarnation, is_dead=call.ended in ("cancelled", "actor_died", "stopped"))
            manager.changed()


class Peer:
    """A tie to one (manager, epoch). ``lane`` is set once it stands."""

    def __init__(self, ref: Ref) -> None:
        self.ref = ref
        self.ready: asyncio.Future[Lane] = asyncio.get_running_loop().create_future()


class Peers:
    """Every tie of one manager. Its tasks belong to the manager."""

    def __init__(self, manager: PoolActor) -> None:
        self._manager = manager
        self._peers: dict[tuple[Address, str], Peer] = {}

    async def enter(self, address: Address, epoch: str) -> Peer:
        """Return the tie to a manager, made now if there is none.

        Raises StaleReservation, and what the bus says of a manager that cannot be reached.
        """
        peer = self._peers.get((address, epoch))
        if peer is None:
            peer = self._peers[address, epoch] = Peer(self._manager.node.ref(address))
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
            async with peer.ref.stream(Tie(epoch), timeout=FOREVER) as items:
                async for item in items:
                    peer.ready.set_result(await open_lane(item.pool_path, node.exchange, epoch=epoch))
        except BusError as broken:
            error = broken
        except WrongPool as broken:
            error = StaleReservation(reservation_id="", reason=str(broken))
        except (OSError, ValueError) as broken:
            error = LinkLost(f"the pool of {address} is out of reach: {broken}")
        finally:
            self._peers.pop((address, epoch), None)
            if not peer.ready.done():
                peer.ready.set_exception(error or LinkLost(f"no tie to {address}"))
                peer.ready.exception()  # Nobody may be waiting for it.
            elif not peer.ready.exception():
                # Also under a write: the next manager of that device may have the same memory, and lend it anew.
                peer.ready.result().close()
