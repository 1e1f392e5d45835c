"""The ties between KV managers, from both sides: one standing tie, and one lane, for each manager that is sent to.

While a tie stands, the receiving manager knows that the writer's process lives; when it breaks because that process
died, all its writes are over. When the receiving manager dies, its lane is closed, also under those who write.
"""

import asyncio
from collections.abc import AsyncGenerator

from callboard.actors.protocol import Probe, Tie, Tied
from callboard.bus import FOREVER, Address, BusError, Call, LinkLost, Ref
from callboard.bus.calls import enter_call
from callboard.kv.lanes import Lane, open_lane
from callboard.kv.layout import StaleReservation
from callboard.kv.pool_socket import WrongPool

from .pool_actor import PoolActor

MOST_KNOWN = 1000
"""Writers' nodes that are remembered after they have left."""
INQUIRY_S = 1.0
"""How often a writer whose tie broke is asked whether it is still the one that was let in."""
SELF = "self"
"""The writer of copies inside a manager's own pool: always heard of."""


class Writers:
    """Serves Tie for one manager: knows which of the processes that write into its pool are alive."""

    def __init__(self, manager: PoolActor) -> None:
        self._manager = manager
        self._incarnations: dict[str, str] = {}

    async def serve(self, message: Tie, call: Call) -> AsyncGenerator[Tied, None]:
        """Stand until the tie breaks; if that proves the writer dead, its writes are over."""
        manager, incarnation = self._manager, call.caller_incarnation
        reservations = manager.blocks.reservations
        before = self._incarnations.get(call.caller)
        if before is not None and before != incarnation:
            reservations.writer_died(before)  # Its node's name has passed to another process.
        self._remember(call.caller, incarnation)
        reservations.tie(incarnation)
        manager.changed()
        try:
            yield Tied(manager.pool_path)
            await asyncio.get_running_loop().create_future()
        finally:
            # Leaving the tie on purpose is as good as dying: a writer that stops does not write any more. But this
            # manager's own end says nothing about the writer.
            reservations.untie(incarnation, is_dead=call.ended in ("cancelled", "actor_died"))
            manager.changed()
            if message.writer is not None and call.ended != "stopped":
                manager.spawn(self._inquire(message.writer, incarnation))

    def _remember(self, node: str, incarnation: str) -> None:
        """Note who has a node's name now, and forget one of many who have left and write nothing."""
        known, reservations = self._incarnations, self._manager.blocks.reservations
        known.pop(node, None)
        known[node] = incarnation
        if len(known) > MOST_KNOWN:
            oldest, last = next(iter(known.items()))
            if not reservations.is_tied(last) and not reservations.is_written_by(last):
                del known[oldest]

    async def _inquire(self, writer: Address, incarnation: str) -> None:
        """Find out what became of a writer whose tie broke, as long as writes of its are open.

        Its successor proves it dead. Nobody else can, on another host: the blocks stay in quarantine until then.
        """
        enter_call(None)  # The tie is over.
        manager = self._manager
        reservations = manager.blocks.reservations
        while reservations.is_written_by(incarnation) and not reservations.is_tied(incarnation):
            try:
                answer = await manager.node.ref(writer).ask(Probe(b""), timeout=INQUIRY_S)
            except BusError:
                pass  # It is out of reach still.
            else:
                if answer.incarnation != incarnation:
                    reservations.writer_died(incarnation)
                    manager.changed()
                    return
            await manager.node.clock.sleep(INQUIRY_S)


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
