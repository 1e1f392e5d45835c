"""The ties of other KV managers to this one: which of the processes that write into its pool are alive.

While a tie stands, its writer's process is known to live; when it breaks because that process died, all its writes are
over. By what opens and closes writes a slow writer cannot be told from a dead one. The other side is peers.py.
"""

import asyncio
from collections.abc import AsyncGenerator

from callboard.actors.protocol import BadRequest, Probe, Tie, Tied
from callboard.bus import Address, BusError, Call
from callboard.bus.calls import enter_call

from .pool_actor import PoolActor
from .receiver import Receiver

MOST_KNOWN = 1000
"""Writers' nodes that are remembered after they have left."""
INQUIRY_S = 1.0
"""How often a writer whose tie broke is asked whether it is still the one that was let in."""
SELF = "self"
"""The writer of copies inside a manager's own pool: always heard of."""


class Writers:
    """Serves Tie for one manager: knows which of the processes that write into its pool are alive."""

    def __init__(self, manager: PoolActor, receiver: Receiver) -> None:
        self._manager = manager
        self._receiver = receiver
        self._incarnations: dict[str, str] = {}

    async def serve(self, message: Tie, call: Call) -> AsyncGenerator[Tied, None]:
        """Stand until the tie breaks; if that proves the writer dead, its writes are over.

        Raises BadRequest for a tie in another node's name.
        """
        manager, incarnation = self._manager, call.caller_incarnation
        if message.writer is not None and message.writer.node != call.caller:
            raise BadRequest(reason=f"{call.caller} ties itself in the name of {message.writer.node}")
        tied, line = await self._receiver.welcome(message)
        reservations = manager.blocks.reservations
        before = self._incarnations.get(call.caller)
        if before is not None and before != incarnation:
            reservations.writer_died(before)  # Its node's name has passed to another process.
        self._remember(call.caller, incarnation)
        reservations.tie(incarnation)
        manager.changed()
        if line is not None:
            self._receiver.begin(incarnation, line)
        try:
            yield tied
            await asyncio.get_running_loop().create_future()
        finally:
            if line is not None:
                self._receiver.end(incarnation, line)
            # Leaving the tie on purpose is as good as dying: a writer that stops does not write any more. But this
            # manager's own end says nothing about the writer. One over a wire never touches the pool itself, and what
            # it sends is put nowhere now: it may be on a host that nobody ever hears of again.
            is_over = line is not None or call.ended in ("cancelled", "actor_died")
            reservations.untie(incarnation, is_dead=is_over)
            manager.changed()
            if message.writer is not None and call.ended != "stopped":
                manager.spawn(self._inquire(message.writer, incarnation))

    def nodes(self) -> dict[str, str]:
        """Return the nodes of the writers known here, by incarnation."""
        return {incarnation: node for node, incarnation in self._incarnations.items()}

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
                # Only of its own node: an address may lead to another.
                if answer.node == writer.node and answer.incarnation != incarnation:
                    reservations.writer_died(incarnation)
                    manager.changed()
                    return
            await manager.node.clock.sleep(INQUIRY_S)
