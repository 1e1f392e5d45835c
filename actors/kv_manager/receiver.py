"""Pages that come packed over a wire: what a sender announces is received into staging, and put into its slots here.

Nothing that comes over the wire says where it goes: the slots are looked up in the books once the bytes are here, and
only if the write they belong to is still open. Each tie has its own buffers, so a sender that stops holds up nobody
else's pages. Whatever is announced properly is received, also if it is refused in the end: its sender waits to be rid
of it.
"""

import asyncio
from contextlib import suppress

from callboard.actors.protocol import Done, TakePages, Tie, Tied
from callboard.bus import BusError, Call, LinkLost
from callboard.kv.lanes import (
    INPROC,
    TRAILER_BYTES,
    Inlet,
    LaneClosed,
    LaneOffer,
    NoLane,
    Staging,
    WireBroken,
    WiresMissing,
    is_mappable,
    machine_id,
    usable_lanes,
)
from callboard.kv.layout import BadRange, SlotRun, StaleReservation
from callboard.kv.packed_form import packed_bytes
from callboard.kv.packing import unpack
from callboard.kv.reservation import State
from callboard.kv.slots import slot_runs

from .pool_actor import PoolActor

MOST_PIECE_BYTES = 4 << 20
"""The most bytes of pages that are taken in one message."""
NUM_BUFFERS = 4
"""Messages of one tie that are received at a time."""
MOST_TAGS = 4096
"""The tags that a tie remembers: each is good for one message. No more can be announced at a time."""


class Line:
    """What one tie brings over its wire."""

    def __init__(self, inlet: Inlet) -> None:
        self.staging = Staging(NUM_BUFFERS, MOST_PIECE_BYTES + TRAILER_BYTES)
        self.is_closed = False
        self.num_announced = 0
        """Messages that are to arrive."""
        self._inlet = inlet
        self._tags: dict[int, None] = {}

    def knows(self, tag: int) -> bool:
        """Note a tag; return whether it has been announced before."""
        if tag in self._tags:
            return True
        self._tags[tag] = None
        if len(self._tags) > MOST_TAGS:
            del self._tags[next(iter(self._tags))]
        return False

    async def receive(self, tag: int, num_bytes: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with a message of ``num_bytes`` of pages. Raises LinkLost."""
        trailer = buffer[num_bytes : num_bytes + TRAILER_BYTES]
        sign = tag.to_bytes(TRAILER_BYTES, "little")
        trailer[:] = bytes(byte ^ 0xFF for byte in sign)
        try:
            await self._inlet.receive(tag, buffer[: num_bytes + TRAILER_BYTES])
        except WireBroken as error:
            raise LinkLost(f"the pages did not arrive: {error}") from None
        if trailer != sign:
            raise LinkLost("fewer bytes of pages arrived than were announced")

    def close(self) -> None:
        """End all that is under way. A repeat does nothing."""
        self.is_closed = True
        self._inlet.close()
        self.staging.close()


class Receiver:
    """Serves TakePages for one manager, and says which lane leads to it."""

    def __init__(self, manager: PoolActor) -> None:
        self._manager = manager
        self._lines: dict[str, Line] = {}

    async def hold_wires(self) -> None:
        """End all of the manager's wires when this is cancelled; return when they have ended."""
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:  # And not finally: what is only collected has no loop to close on.
            closing = asyncio.ensure_future(self._manager.wires.close())
            while not closing.done():
                with suppress(asyncio.CancelledError):  # After a crash it is cancelled again, when the process stops.
                    await asyncio.shield(closing)
            closing.result()
            raise

    async def welcome(self, message: Tie) -> tuple[Tied, Line | None]:
        """Return what a writer that ties up is told, and what it will send over if that is a wire.

        Raises NoLane.
        """
        manager = self._manager
        usable = usable_lanes(manager.config.transport, manager.wires, manager.store.gpu)
        kinds = [kind for kind in message.lanes if kind in usable]
        is_near = message.machine in ("", machine_id())
        offer, line = None, None
        if manager.pool_path.startswith(INPROC):
            if "inproc" in kinds:
                offer = LaneOffer("inproc", manager.pool_path)
        else:
            for kind in kinds:
                if is_mappable(kind, is_near=is_near, gpus=(message.gpu, manager.store.gpu)):
                    offer = LaneOffer(kind, manager.pool_path, machine=machine_id())
                    break
        if offer is None and "ucx" in kinds:
            try:
                invitation = await manager.wires.invite()
            except WiresMissing as error:
                raise NoLane(manager=manager.name, reason=str(error)) from None
            address, secret, dtype = invitation.address, invitation.secret, manager.config.wire_dtype
            offer, line = LaneOffer("ucx", address, secret, dtype=dtype), Line(invitation.inlet)
        if offer is None:
            wanted, has = ", ".join(message.lanes) or "none", ", ".join(usable) or "none"
            raise NoLane(manager=manager.name, reason=f"it has {has}, and its peer {wanted}")
        return Tied(manager.pool_path, (offer,), manager.config.layout, manager.config.num_blocks), line

    def begin(self, writer: str, line: Line) -> None:
        """Take what a writer announces from its line; one that it had before is of no use to it any more."""
        before = self._lines.get(writer)
        if before is not None:
            before.close()
        self._lines[writer] = line

    def end(self, writer: str, line: Line) -> None:
        """End what comes over a line: its tie has ended."""
        line.close()
        if self._lines.get(writer) is line:
            del self._lines[writer]

    async def take(self, message: TakePages, call: Call) -> Done:
        """See TakePages."""
        line = self._lines.get(call.caller_incarnation)
        if line is None or line.is_closed:
            raise LinkLost("there is no tie over whose lane these pages could come")
        try:
            self._check(message)
            reason = "these pages were announced before" if line.knows(message.tag) else ""
            if line.num_announced >= MOST_TAGS:
                reason = f"{MOST_TAGS} others are still to come"
            if reason:
                begin, end = message.token_begin, message.token_end
                raise BadRange(begin=begin, end=end, num_tokens=end, reason=reason)
        except BadRange:
            line.close()  # What it sends will never be taken: whoever does that is better off without a wire.
            raise
        line.num_announced += 1
        arrival = self._manager.spawn(self._arrive(message, line, call.caller_incarnation))
        # Shielded: a message on its way cannot be called back, and its buffer is lent until it is here.
        failed = await asyncio.shield(arrival)
        if failed is not None:
            raise failed
        return Done()

    def _check(self, message: TakePages) -> None:
        """Raise BadRange for what cannot be a piece of this pool's pages, whoever sends it."""
        layout, begin, end = self._manager.config.layout, message.token_begin, message.token_end
        num_tokens, num_layers = end - begin, message.layer_end - message.layer_begin

        def refuse(reason: str) -> BadRange:
            return BadRange(begin=begin, end=end, num_tokens=end, reason=reason)

        if not 0 <= begin < end:
            raise refuse("it is empty")
        if not 0 <= message.layer_begin < message.layer_end <= layout.num_layers:
            raise refuse("it has layers that are none")
        if not 0 < message.num_bytes <= MOST_PIECE_BYTES:
            raise refuse(f"at most {MOST_PIECE_BYTES} bytes are taken at a time")
        if not 0 <= message.tag < 1 << 64:
            raise refuse("its tag is none")
        if message.wire_dtype != (self._manager.config.wire_dtype or layout.dtype):
            raise refuse("it is packed as what was not asked for")
        expected = packed_bytes(layout, num_tokens, num_layers, message.wire_dtype)
        if message.num_bytes != expected:
            raise refuse(f"its pages are {expected} bytes, and {message.num_bytes} are announced")

    async def _arrive(self, message: TakePages, line: Line, writer: str) -> BusError | None:
        """Receive a piece and put it into place; return what it is refused with."""
        try:
            buffer = await line.staging.take()
        except LaneClosed:
            line.num_announced -= 1
            return LinkLost("the tie ended before the pages arrived")
        try:
            await line.receive(message.tag, message.num_bytes, buffer)
            # From here to the end without a pause: nobody else gets to the books, or to the slots.
            runs = self._slots(message, line, writer)
            layers = range(message.layer_begin, message.layer_end)
            unpack(self._manager.store, runs, layers, buffer[: message.num_bytes], wire_dtype=message.wire_dtype)
        except BusError as error:
            return error
        finally:
            line.num_announced -= 1
            line.staging.give(buffer)
        return None

    def _slots(self, message: TakePages, line: Line, writer: str) -> tuple[SlotRun, ...]:
        """Return where a piece goes. Raises StaleReservation, BadRange."""
        manager, reservation_id = self._manager, message.reservation_id
        manager.require_epoch(reservation_id, message.epoch)
        held = manager.blocks.reservations.get(reservation_id)
        write = held.reservation.writes.get(message.write_id)
        if write is None or write.writer != writer:
            raise StaleReservation(reservation_id=reservation_id, reason="this write of it is not open")
        if held.reservation.state is State.QUARANTINED:
            raise StaleReservation(reservation_id=reservation_id, reason="it was given up while it was written")
        if line.is_closed:
            raise LinkLost("the tie ended before the pages arrived")
        if not write.begin <= message.token_begin < message.token_end <= write.end:
            raise BadRange(
                begin=message.token_begin,
                end=message.token_end,
                num_tokens=write.end,
                reason=f"the write is of [{write.begin}, {write.end})",
            )
        return slot_runs(held.block_table, message.token_begin, message.token_end, manager.config.layout.block_size)
