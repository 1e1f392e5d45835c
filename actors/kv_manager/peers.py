"""The ties to other KV managers: one standing tie, and one lane, for each manager that is sent to.

When the receiving manager dies, its lane is closed, also under those who write. The other side is writers.py.
"""

import asyncio

from callboard.actors.protocol import TakePages, Tie, Tied
from callboard.bus import FOREVER, Address, BusError, LinkLost, Ref, current_call
from callboard.bus.calls import enter_call
from callboard.kv.lanes import (
    MAPPED,
    Lane,
    LaneOffer,
    NoLane,
    PageWrite,
    Piece,
    WireBroken,
    WiresMissing,
    machine_id,
    open_lane,
    open_wire_lane,
    usable_lanes,
)
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
        lanes = usable_lanes(self._manager.config.transport, self._manager.wires, self._manager.store.gpu)
        error: BusError | None = None
        try:
            while lanes and not peer.ready.done():
                lanes = await self._tie(peer, address, epoch, lanes)
            if not peer.ready.done():
                error = NoLane(manager=address.actor, reason="none of those that this host has can be gone")
        except BusError as broken:
            error = broken
        except WrongPool as broken:
            error = StaleReservation(reservation_id="", reason=str(broken))
        except WiresMissing as broken:
            error = NoLane(manager=address.actor, reason=str(broken))
        except (OSError, ValueError, WireBroken) as broken:
            error = LinkLost(f"the pool of {address} is out of reach: {broken}")
        finally:
            self._peers.pop(_key(address, epoch), None)
            if not peer.ready.done():
                peer.ready.set_exception(error or LinkLost(f"no tie to {address}"))
                peer.ready.exception()  # Nobody may be waiting for it.
            elif not peer.ready.exception():
                # Also under a write: the next manager of that device may have the same memory, and lend it anew.
                peer.ready.result().close()

    async def _tie(self, peer: Peer, address: Address, epoch: str, lanes: tuple[str, ...]) -> tuple[str, ...]:
        """Tie up and stay; return the lanes that are left to try where the one that was offered cannot be gone."""
        manager = self._manager
        message = Tie(epoch, manager.ref.address, lanes, machine_id(), manager.store.gpu)
        async with peer.ref.stream(message, timeout=FOREVER) as items:
            async for item in items:
                if peer.ready.done():
                    raise LinkLost(f"{address} tied itself twice")
                offer = item.offers[0] if item.offers else LaneOffer("shm", item.pool_path)
                left = lanes[lanes.index(offer.kind) + 1 :] if offer.kind in lanes else ()
                try:
                    peer.ready.set_result(await self._open(peer, address, epoch, item, offer))
                except (OSError, WireBroken):
                    if not left:
                        raise
                    return left
        return ()

    async def _open(self, peer: Peer, address: Address, epoch: str, tied: Tied, offer: LaneOffer) -> Lane:
        manager, layout = self._manager, self._manager.config.layout
        if offer.kind in MAPPED:
            pace = manager.pace(address.actor)
            return await open_lane(tied.pool_path, manager.node.exchange, epoch=epoch, layout=layout, pace=pace)
        if tied.layout is None or not tied.layout.can_exchange_with(layout):
            raise WrongPool(f"{address} has a pool of another layout")
        keeper = asyncio.current_task()
        assert keeper is not None

        async def announce(pages: PageWrite, piece: Piece) -> None:
            # Without the call's deadline: the pages are on their way, whoever has stopped waiting for them.
            if (call := current_call()) is not None:
                enter_call(manager.node.root(manager.name, call.request_id, span=call.span, trace=call.trace))
            await peer.ref.ask(_taking(pages, piece), timeout=FOREVER)

        return await open_wire_lane(offer, manager.wires, announce, layout=tied.layout, on_break=keeper.cancel)


def _taking(pages: PageWrite, piece: Piece) -> TakePages:
    return TakePages(
        pages.reservation_id,
        pages.epoch,
        pages.write_id,
        piece.token_begin,
        piece.token_end,
        piece.layers.start,
        piece.layers.stop,
        piece.tag,
        piece.num_bytes,
        piece.dtype,
    )


def _key(address: Address, epoch: str) -> tuple[str, str, str]:
    """Name a manager by where it is: under other names of its node it is the same, and tied already."""
    return address.endpoint or address.node, address.actor, epoch
