"""remote_send: get the KV of a prompt's beginning in place here, and write a range of it into another pool.

It comes here and not to the engine, so that a prefix that is all cached is sent although the engine is busy, or dead.
Computing costs no extra hop: the engine gets its blocks with the request. A repeat joins the first, or gets its answer.

What is cached leaves at once; the rest leaves layer by layer while an engine computes it. Two promises are kept to
the end, whatever fails in between: the receiver hears that the write is over, and no block is lent to anybody while
an engine may still write into it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec

from callboard.actors.protocol import (
    Abort,
    CloseWrite,
    ComputeKv,
    KvAddr,
    KvComputed,
    OpenWrite,
    RemoteSend,
    Sent,
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
from callboard.kv.layout import BadRange, StaleReservation
from callboard.kv.slots import num_slots, resolve_range
from callboard.kv.tokens import TOKEN_BYTES, digest_of, num_tokens, pack_tokens

from .attachments import Attachments
from .peers import Peers
from .pool_actor import PoolActor
from .queue import Priority
from .transfer import OpenedWrite, Transfer
from .writers import SELF

RETRY_S = 0.2
MOST_ANSWERS = 1000
"""Of sends that are over, kept for those who ask again."""
CLOSING_S = 1.0
"""How long a repeated send waits until the receiver has heard that the first one is over."""
GIVE_UP_S = 600.0
"""How long a receiver that cannot be reached is told that a write is over. If it lives, it sees our tie end."""


HeldLoan = Callable[[], Loan]
"""Holds the blocks of a running sequence, for sending."""
Repeated = tuple[str, int, str, str, str, int, int]
"""What makes two RemoteSends the same: request, attempt, engine, epoch, reservation and range."""


class Sender:
    """Serves RemoteSend for one manager. ``fill`` brings what a loan lacks from the tiers, as far as it is there."""

    def __init__(self, manager: PoolActor, engines: Attachments, fill: Callable[[Loan], Awaitable[Loan]]) -> None:
        self.is_stopping = False
        """Whether nobody is to be told anything any more: the ties end, and that says it all."""
        self._manager = manager
        self._engines = engines
        self._fill_loan = fill
        self._peers = Peers(manager)
        self._under_way: dict[Repeated, asyncio.Future[Sent]] = {}
        self._answers: dict[Repeated, Sent] = {}
        self._closing: dict[asyncio.Future[None], str] = {}
        """Writes that the receiver has not yet heard the end of, with their reservation."""

    def lanes(self) -> dict[str, str]:
        """Return the lanes to other managers that stand, by name."""
        return self._peers.lanes()

    async def send(self, message: RemoteSend, held: HeldLoan | None = None) -> Sent:
        """See RemoteSend. With ``held``, it is a running sequence's KV that is sent, and nothing is computed.

        Raises StaleReservation, BadRange, OutOfBlocks, UnknownActor, and as the engine does.
        """
        manager, kv = self._manager, message.kv
        begin, end = resolve_range(message.begin, message.end, num_tokens(message.prompt))
        if begin >= end:
            return Sent(0, "", 0, 0, 0.0, 0.0, 0.0, 0.0)
        if not kv.layout.can_exchange_with(manager.config.layout):
            raise StaleReservation(reservation_id=kv.reservation_id, reason="its pool holds the KV of another model")
        if not kv.begin <= begin < end <= kv.end:
            raise BadRange(begin=begin, end=end, num_tokens=kv.end, reason="it is not inside the reservation")
        key = (message.request_id, message.attempt, message.engine, kv.epoch, kv.reservation_id, begin, end)
        while (first := self._under_way.get(key)) is not None:
            # Asked again. If the first is given up, or fails for reasons of its own, it is this one's turn.
            await asyncio.wait((first,))
        if (answer := self._answers.get(key)) is not None:
            return answer
        done = self._under_way[key] = asyncio.get_running_loop().create_future()
        try:
            answer = self._answers[key] = await self._send(message, begin, end, held)
        finally:
            del self._under_way[key]
            done.cancel()
        if len(self._answers) > MOST_ANSWERS:
            del self._answers[next(iter(self._answers))]
        return answer

    async def _send(self, message: RemoteSend, begin: int, end: int, held: HeldLoan | None) -> Sent:
        manager, kv = self._manager, message.kv
        begin_s = manager.node.clock.now()
        async with self._write(message, begin, end, begin_s) as write:
            # Before an engine computes: a refusal after that would be taken for the engine's, that it writes nothing.
            slots = write.opened.slots
            if num_slots(slots) != end - begin or not write.lane.fits(slots):
                raise StaleReservation(reservation_id=kv.reservation_id, reason="its manager names slots that are none")
            if held is not None:
                return await self._fill(write, Transfer(manager, write, loan := held()), loan)
            loan = await manager.queue.take(
                Priority.SEND,
                self._num_blocks(kv, end),
                lambda: manager.blocks.lend(message.engine, message.prompt, end),
                manager.end_loan,
                message.wait_s,
            )
            try:
                loan = await self._fill_loan(loan)
            except BaseException:
                manager.end_loan(loan)
                raise
            return await self._fill(write, Transfer(manager, write, loan), loan)

    def _num_blocks(self, kv: KvAddr, end: int) -> int:
        """Return how many blocks of this pool it comes to, those of the reservation included where they are here."""
        blocks = self._manager.blocks
        total = blocks.allocator.blocks_for(end)
        if kv.manager != self._manager.ref.address:
            return total
        held = blocks.reservations.get(kv.reservation_id)
        return total + len(held.block_table) - blocks.allocator.blocks_for(held.num_cached_tokens)

    async def _fill(self, write: OpenedWrite, transfer: Transfer, loan: Loan) -> Sent:
        """Send all of it; the loan is given back when nobody can be reading it or writing into it any more."""
        manager, clock = self._manager, self._manager.node.clock
        computed = KvComputed(0, 0.0, 0.0)
        is_still_lent = False
        try:
            if loan.engine is not None:
                try:
                    computed = await self._compute(write, transfer, loan)
                except Refusal as error:
                    # The engine says no: it is not writing. The receiver says it of pages, in the midst of a step.
                    is_still_lent = transfer.has_failed_with(error)
                    raise
                except BaseException:
                    is_still_lent = True
                    raise
                if not manager.blocks.has_computed(loan):
                    raise ActorDied(f"engine {loan.engine} left before all of [{write.begin}, {write.end}) was sent")
            tail_s = clock.now()
            if write.is_here:
                for begin, end in manager.blocks.graft(loan, write.opening.reservation_id, write.opening.write_id):
                    transfer.put(begin, end, write.all_layers)
            elif loan.engine is None:
                transfer.put(write.begin, write.end, write.all_layers)
            await transfer.drain()
            if not write.is_here and not transfer.is_complete:
                raise ActorDied(f"engine {loan.engine} did not report all of [{write.begin}, {write.end})")
            ended_s = clock.now()
        finally:
            try:
                await transfer.abandon()
            finally:
                if is_still_lent:
                    manager.spawn(self._reclaim(loan))
                else:
                    manager.end_loan(loan)
        return Sent(
            transfer.num_bytes,
            write.lane.name,
            computed.num_computed_tokens,
            loan.num_cached_tokens,
            computed.queue_s,
            computed.compute_s,
            transfer.send_s,
            ended_s - tail_s,
        )

    # ---- the engine's side ---------------------------------------------------------------------------------------

    def _engine(self, loan: Loan) -> Ref:
        assert loan.engine is not None
        return self._manager.node.ref(self._engines.address(loan.engine))

    async def _compute(self, write: OpenedWrite, transfer: Transfer, loan: Loan) -> KvComputed:
        """Have the engine compute what is not cached, and let go of each part as it is done."""
        table = pack_tokens(loan.block_table)
        request = ComputeKv(loan.loan_id, loan.tokens, table, loan.num_cached_tokens, loan.attachment)
        computed, call, node = None, current_call(), self._manager.node
        begin_s = _since(call, node)
        async with self._engine(loan).stream(request) as items:
            node.note_turn(call, begin_s, "lend", end=_sent(call))
            if not write.is_here:
                transfer.put(0, loan.num_cached_tokens, write.all_layers)
            async for item in items:
                if isinstance(item, KvComputed):
                    computed = item
                elif not 0 <= item.layer_begin <= item.layer_end <= write.layout.num_layers:
                    raise ActorDied(f"engine {loan.engine} reports layers that the pool does not have")
                elif not write.is_here:
                    transfer.put(item.token_begin, item.token_end, range(item.layer_begin, item.layer_end))
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
    async def _write(self, message: RemoteSend, begin: int, end: int, begin_s: float) -> AsyncIterator[OpenedWrite]:
        """Open the write, give leave and lane, close the write: complete if the body came to its end."""
        manager, kv = self._manager, message.kv
        before = [each for each, reservation_id in self._closing.items() if reservation_id == kv.reservation_id]
        if before:  # Else an attempt would be in the way of the one that repeats it.
            await asyncio.wait(before, timeout=CLOSING_S)
        write_id = manager.node.new_id()
        digest = digest_of(message.prompt[: end * TOKEN_BYTES])
        opening = OpenWrite(kv.reservation_id, kv.epoch, write_id, begin, end, digest)
        closing = CloseWrite(kv.reservation_id, kv.epoch, write_id, is_complete=False)
        if kv.manager == manager.ref.address:
            opened = manager.open_write(opening, writer=SELF)
            try:
                yield OpenedWrite(opening, opened, manager.own_lane, manager.config.layout, manager.name, is_here=True)
                closing = msgspec.structs.replace(closing, is_complete=True)
            finally:
                manager.close_write(closing)
            return
        peer = await self._peers.enter(kv.manager, kv.epoch)
        call = current_call()
        is_closed = False
        try:
            try:
                opened = await peer.ref.ask(opening)
            except Refusal:
                is_closed = True
                raise
            manager.node.note_turn(call, begin_s, "tie", end=_sent(call))
            write = OpenedWrite(opening, opened, peer.ready.result(), kv.layout, kv.manager.actor)
            yield write
            begin_s = _since(call, manager.node)
            digests = b"" if write.digests is None else write.digests.to_bytes()
            closing = msgspec.structs.replace(closing, is_complete=True, digests=digests)
            try:
                await peer.ref.ask(closing)
            except Refusal:
                is_closed = True
                raise
            manager.node.note_turn(call, begin_s, "settle", end=_sent(call))
            is_closed = True
        finally:
            if not is_closed:
                self._closing[task := manager.spawn(self._close(kv.manager, closing))] = kv.reservation_id
                task.add_done_callback(self._closing.pop)

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
