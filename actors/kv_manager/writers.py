"""The ties of other KV managers to this one: which of the processes that write into its pool are alive.

While a tie stands, its writer's process is known to live; when it breaks because that process died, all its writes are
over. The other side is peers.py.
"""

import asyncio
from collections.abc import AsyncGenerator

from callboard.actors.protocol import Probe, Tie, Tied
from callboard.bus import Address, BusError, Call
from callboard.bus.calls import enter_call

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
