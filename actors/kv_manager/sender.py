"""remote_send: get the KV of a prompt's beginning in place here, and write a range of it into another pool.

What is cached leaves at once; the rest leaves layer by layer while an engine computes it. Two promises are kept to
the end, whatever fails in between: the receiver hears that the write is over, and no block is lent to anybody while
an engine may still write into it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from callboard.actors.protocol import (
    Abort,
    CloseWrite,
    ComputeKv,
    KvAddr,
    KvComputed,
    LayersDone,
    OpenWrite,
    RemoteSend,
    Sent,
    WriteOpened,
)
from callboard.bus import (
    FOREVER,
    ActorDied,
    Address,
    AskTimeout,
    BusError,
    Call,
    LinkLost,
    Node,
    Ref,
    Refusal,
    current_call,
)
from callboard.bus.calls import enter_call
from callboard.kv.block_manager import Loan
from callboard.kv.lanes import Lane, LaneClosed, MappedLane, PageWrite
from callboard.kv.layout import BadRange, SlotRun, StaleReservation
from callboard.kv.slots import cut_runs, num_slots, resolve_range, slot_runs
from callboard.kv.tokens import num_tokens, pack_tokens

from .attachments import Attachments
from .peers import Peers
from .pool_actor import PoolActor
from .queue import Priority
from .writers import SELF

RETRY_S = 0.2
GIVE_UP_S = 600.0
"""How long a receiver that cannot be reached is told that a write is over. If it lives, it sees our tie end."""


class OpenedWrite:
    """Leave to write ``slots``, those of ``[begin, end)``, and the lane to do it over."""

    def __init__(self, opening: OpenWrite, opened: WriteOpened, lane: Lane) -> None:
        self.opening = opening
        self.opened = opened
        self.lane = lane
        self.begin = opening.begin
        self.end = opening.end

    def pages(self, begin: int, end: int, layers: range, source: tuple[SlotRun, ...]) -> PageWrite:
        """Return what is to be written of the tokens ``[begin, end)``."""
        opening = self.opening
        target = cut_runs(self.opened.slots, begin - self.begin, end - self.begin)
        return PageWrite(opening.reservation_id, opening.epoch, opening.write_id, begin, end, layers, source, target)


class Transfer:
    """The pages of a write on their way from a loan into a reservation."""

    def __init__(self, manager: PoolActor, kv: KvAddr, write: OpenedWrite, loan: Loan) -> None:
        self.num_bytes = 0
        self._num_sent = 0
        self.seconds = 0.0
        self._manager = manager
        self._kv = kv
        self._write = write
        self._loan = loan
        self._begin = write.begin
        self._end = write.end

    async def send(self, begin: int, end: int, layers: range) -> None:
        """Send what of ``[begin, end)`` is wanted, for these layers. Returns when it is in place."""
        begin, end = max(begin, self._begin), min(end, self._end)
        if begin >= end:
            return
        clock = self._manager.node.clock
        started = clock.now()
        source = slot_runs(self._loan.block_table, begin, end, self._manager.config.layout.block_size)
        try:
            num_bytes = await self._write.lane.write(self._manager.store, self._write.pages(begin, end, layers, source))
        except LaneClosed:
            raise LinkLost(f"the tie to {self._kv.manager} broke before all pages were sent") from None
        self._num_sent += (end - begin) * len(layers)
        self.num_bytes += num_bytes
        self._manager.num_bytes_sent += num_bytes
        ended = clock.now()
        self.seconds += ended - started
        self._manager.node.note(
            current_call(),
            "send",
            started,
            end=ended,
            num_bytes=num_bytes,
            lane=self._write.lane.name,
            to=self._kv.manager.actor,
            layer_begin=layers.start,
            layer_end=layers.stop,
            token_begin=begin,
            token_end=end,
        )

    @property
    def is_complete(self) -> bool:
        """Whether every layer of every token has been sent."""
        return self._num_sent >= (self._end - self._begin) * self._kv.layout.num_layers


class Sender:
    """Serves RemoteSend for one manager."""

    def __init__(self, manager: PoolActor, engines: Attachments) -> None:
        self.is_stopping = False
        """Whether nobody is to be told anything any more: the ties end, and that says it all."""
        self._manager = manager
        self._engines = engines
        self._peers = Peers(manager)

    def lanes(self) -> dict[str, str]:
        """Return the lanes to other managers that stand, by name."""
        return self._peers.lanes()

    async def send(self, message: RemoteSend) -> Sent:
        """See RemoteSend. Raises StaleReservation, BadRange, OutOfBlocks, UnknownActor, and as the engine does."""
        manager, kv = self._manager, message.kv
        begin_s = manager.node.clock.now()
        begin, end = resolve_range(message.begin, message.end, num_tokens(message.prompt))
        if begin >= end:
            return Sent(0, "", 0, 0, 0.0, 0.0, 0.0, 0.0)
        if not kv.layout.can_exchange_with(manager.config.layout):
            raise StaleReservation(reservation_id=kv.reservation_id, reason="its pool holds the KV of another model")
        if not kv.begin <= begin < end <= kv.end:
            raise BadRange(begin=begin, end=end, num_tokens=kv.end, reason="it is not inside the reservation")
        async with self._write(kv, begin, end, begin_s) as write:
            # Before an engine computes: a refusal after that would be taken for the engine's, that it writes nothing.
            slots = write.opened.slots
            if num_slots(slots) != end - begin or not write.lane.fits(slots):
                raise StaleReservation(reservation_id=kv.reservation_id, reason="its manager names slots that are none")
            loan = await manager.queue.take(
                Priority.SEND,
                self._num_blocks(kv, end),
                lambda: manager.blocks.lend(message.engine, message.prompt, end),
                manager.end_loan,
                message.wait_s,
            )
            transfer = Transfer(manager, kv, write, loan)
            return await self._fill(message, transfer, loan, begin, end, write.lane.name)

    def _num_blocks(self, kv: KvAddr, end: int) -> int:
        """Return how many blocks of this pool it comes to, those of the reservation included where they are here."""
        blocks = self._manager.blocks
        total = blocks.allocator.blocks_for(end)
        if kv.manager != self._manager.ref.address:
            return total
        held = blocks.reservations.get(kv.reservation_id)
        return total + len(held.block_table) - blocks.allocator.blocks_for(held.num_cached_tokens)

    async def _fill(
        self, message: RemoteSend, transfer: Transfer, loan: Loan, begin: int, end: int, lane_name: str
    ) -> Sent:
        """Send all of it; the loan is given back when nobody can be writing into it any more."""
        clock = self._manager.node.clock
        computed = KvComputed(0, 0.0, 0.0)
        is_still_lent = False
        try:
            if loan.engine is not None:
                try:
                    computed = await self._compute(message, transfer, loan)
                except Refusal:
                    raise  # The engine says no: it is not writing.
                except BaseException:
                    is_still_lent = True
                    raise
                if not self._manager.blocks.has_computed(loan) or not transfer.is_complete:
                    raise ActorDied(f"engine {loan.engine} left before all of [{begin}, {end}) was sent")
            tail_started = clock.now()
            if loan.engine is None:
                await transfer.send(begin, end, range(message.kv.layout.num_layers))
            tail_s = clock.now() - tail_started
        finally:
            if is_still_lent:
                self._manager.spawn(self._reclaim(loan))
            else:
                self._manager.end_loan(loan)
        return Sent(
            transfer.num_bytes,
            lane_name,
            computed.num_computed_tokens,
            loan.num_cached_tokens,
            computed.queue_s,
            computed.compute_s,
            transfer.seconds,
            tail_s,
        )

    # ---- the engine's side ---------------------------------------------------------------------------------------

    def _engine(self, loan: Loan) -> Ref:
        assert loan.engine is not None
        return self._manager.node.ref(self._engines.address(loan.engine))

    async def _compute(self, message: RemoteSend, transfer: Transfer, loan: Loan) -> KvComputed:
        """Have the engine compute what is not cached, and send each layer as it is done."""
        table = pack_tokens(loan.block_table)
        request = ComputeKv(loan.loan_id, loan.tokens, table, loan.num_cached_tokens, loan.attachment)
        computed, call, node = None, current_call(), self._manager.node
        begin_s = _since(call, node)
        async with self._engine(loan).stream(request) as items:
            node.note_turn(call, begin_s, "lend", end=_sent(call))
            await transfer.send(0, loan.num_cached_tokens, range(message.kv.layout.num_layers))
            async for item in items:
                if isinstance(item, LayersDone):
                    if not 0 <= item.layer_begin <= item.layer_end <= message.kv.layout.num_layers:
                        raise ActorDied(f"engine {loan.engine} reports layers that the pool does not have")
                    await transfer.send(item.token_begin, item.token_end, range(item.layer_begin, item.layer_end))
                else:
                    computed = item
        if computed is None:
            raise ActorDied(f"engine {loan.engine} ended without having computed the KV")
        return computed

    async def _reclaim(self, loan: Loan) -> None:
        """Give a loan back once the engine has said that it writes no more, or has lost the blocks with its tie."""
        enter_call(None)  # The call that it was lent for is over.
        manager = self._manager
        while manager.blocks.is_with_engine(loan) and not self.is_stopping:
            try:
                await self._engine(loan).ask(Abort(loan.loan_id), timeout=FOREVER)
                break
            except BusError:
                # Also where the actor has crashed: its step runs to its end, and its process ends the tie after that.
                await manager.node.clock.sleep(RETRY_S)
        manager.end_loan(loan)

    # ---- the receiver's side -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _write(self, kv: KvAddr, begin: int, end: int, begin_s: float) -> AsyncIterator[OpenedWrite]:
        """Open the write, give leave and lane, close the write: complete if the body came to its end."""
        manager = self._manager
        write_id = manager.node.new_id()
        opening = OpenWrite(kv.reservation_id, kv.epoch, write_id, begin, end)
        if kv.manager == manager.ref.address:
            opened = manager.open_write(opening, writer=SELF)
            is_complete = False
            try:
                own = MappedLane("inproc", manager.store, is_owner=False, pace=manager.pace(manager.name))
                yield OpenedWrite(opening, opened, own)
                is_complete = True
            finally:
                manager.close_write(CloseWrite(kv.reservation_id, kv.epoch, write_id, is_complete))
            return
        peer = await self._peers.enter(kv.manager, kv.epoch)
        call = current_call()
        closing = CloseWrite(kv.reservation_id, kv.epoch, write_id, is_complete=False)
        is_closed = False
        try:
            try:
                opened = await peer.ref.ask(opening)
            except Refusal:
                is_closed = True
                raise
            manager.node.note_turn(call, begin_s, "tie", end=_sent(call))
            yield OpenedWrite(opening, opened, peer.ready.result())
            begin_s = _since(call, manager.node)
            closing = CloseWrite(kv.reservation_id, kv.epoch, write_id, is_complete=True)
            try:
                await peer.ref.ask(closing)
            except Refusal:
                is_closed = True
                raise
            manager.node.note_turn(call, begin_s, "settle", end=_sent(call))
            is_closed = True
        finally:
            if not is_closed:
                manager.spawn(self._close(kv.manager, closing))

    async def _close(self, to: Address, closing: CloseWrite) -> None:
        """Tell the receiver that a write is over, until it knows or is dead."""
        enter_call(None)  # The call that was written for is over.
        clock = self._manager.node.clock
        until = clock.now() + GIVE_UP_S
        while clock.now() < until and not self.is_stopping:
            try:
                await self._manager.node.ref(to).ask(closing)
                return
            except (LinkLost, AskTimeout):
                await clock.sleep(RETRY_S)
            except BusError:
                return


def _since(call: Call | None, node: Node) -> float:
    """Begin this manager's turn; return since when it is: since it heard of the end of what it had asked last."""
    begin_s = call.heard_s if call is not None and call.heard_s > call.sent_s else node.clock.now()
    node.begin_turn(call)
    return begin_s


def _sent(call: Call | None) -> float | None:
    return None if call is None else call.sent_s
