"""Everything an engine and its KV manager say to each other about blocks: admission, the slab, sealing, giving back."""

import asyncio
from collections.abc import Callable

from callboard.actors.actor import Actor
from callboard.actors.protocol import Admit, Finish, Give, KvAddr, Refill, Seal
from callboard.bus import FOREVER, BusError, LinkLost, UnknownActor, current_call
from callboard.kv.tokens import pack_tokens, unpack_tokens

from .attachment import Attachment
from .scheduler import Released, Scheduler
from .sequence import Sequence

QUIET_S = 0.05
"""After a refill that brought nothing, and after a recall: no asking for what nobody lacks."""
GRACE_S = 0.01
"""How long somebody who lacks a block waits for a refill, before a sequence is preempted to make room."""
ALONE_GRACE_S = 1.0
"""The same for one who is alone, and could preempt nobody but itself: another engine may give some back."""
REFILL_WAIT_S = 2.0
"""How long a refill waits at the manager for somebody who lacks a block; then it is asked for anew."""
LONGEST_WAIT_S = 3600.0


class BlockSupply:
    """Blocks for one engine's scheduler, over its attachment. ``on_change`` is called when some have come."""

    def __init__(
        self, actor: Actor, engine: str, scheduler: Scheduler, attachment: Attachment, on_change: Callable[[], None]
    ) -> None:
        self._actor = actor
        self._engine = engine
        self._scheduler = scheduler
        self._attachment = attachment
        self._manager = attachment.manager
        self._on_change = on_change
        self._is_refilling = False
        self._refill_again_s = 0.0

    async def admit(self, sequence: Sequence, kv: KvAddr | None, begin_s: float) -> float:
        """Get a sequence blocks for all its tokens and hand it to the scheduler; wait for them as long as the call.

        It is here since ``begin_s``; returns when it had them, on the node's clock. Raises OutOfBlocks,
        StaleReservation, LinkLost; then the sequence holds nothing.
        """
        node, call = self._actor.node, current_call()
        await self._attachment.wait()
        attachment = self._attachment.count
        remaining_s = FOREVER if call is None else call.remaining_s()
        # A little less than the call has, so that the answer is OutOfBlocks and not silence.
        wait_s = min(0.95 * remaining_s, LONGEST_WAIT_S)
        is_placed = False
        try:
            message = Admit(
                self._engine, sequence.sequence_id, pack_tokens(sequence.tokens), kv, wait_s, self._attachment.named
            )
            node.begin_turn(call)
            admitted = await self._manager.ask(message, timeout=remaining_s)
            admitted_s = node.clock.now()
            if call is not None:
                node.note_turn(call, begin_s, "accept", end=call.sent_s)
                admitted_s = call.heard_s or admitted_s
            if not self._attachment.is_current(attachment):
                raise LinkLost(f"{self._engine} lost its KV manager")
            sequence.place(admitted.block_table, admitted.num_cached_tokens)
            self._scheduler.add(sequence)
            is_placed = True
        except UnknownActor as error:
            # The manager has been restarted, and the end of the attachment is on its way here.
            raise LinkLost(f"{self._engine} is not attached to its KV manager: {error}") from None
        finally:
            if not is_placed:
                # The answer may have been under way when the caller left: its blocks would be nobody's.
                self._manager.tell(Finish(self._engine, sequence.sequence_id, b"", b""))
        self._on_change()
        return admitted_s

    def seal(self, sequence: Sequence) -> None:
        """Let others reuse what the sequence has in place."""
        in_place = pack_tokens(sequence.tokens[: sequence.num_computed_tokens])
        self._manager.tell(Seal(self._engine, sequence.sequence_id, in_place, sequence.block_table.tobytes()))

    def give_back(self, released: Released) -> None:
        """Give back the blocks of a sequence that has left the scheduler."""
        sequence = released.sequence
        in_place = pack_tokens(sequence.tokens[: released.num_computed_tokens])
        self._manager.tell(Finish(self._engine, sequence.sequence_id, in_place, released.block_table))

    def recall(self, num_blocks: int) -> None:
        """Give back unused blocks of the slab, because somebody else needs them."""
        if len(self._scheduler.slab):
            self._manager.tell(Give(self._engine, self._scheduler.slab.give(num_blocks), self._attachment.named))
            self._refill_again_s = self._actor.node.clock.now() + QUIET_S

    def refill(self) -> None:
        """Ask for slab blocks in the background where the slab wants some, or give it back where nobody needs it."""
        slab = self._scheduler.slab
        if not self._attachment.is_attached or self._is_refilling:
            return
        if not slab.target and len(slab):
            self._manager.tell(Give(self._engine, slab.give(), self._attachment.named))
        is_short = self._scheduler.is_short
        if slab.wants and (is_short or self._actor.node.clock.now() >= self._refill_again_s):
            self._is_refilling = True
            wait_s = REFILL_WAIT_S if is_short else 0.0
            refill = Refill(self._engine, slab.wants, wait_s, self._attachment.named)
            self._actor.spawn(self._await_refill(refill, self._attachment.count))

    async def _await_refill(self, message: Refill, attachment: int) -> None:
        clock = self._actor.node.clock
        # The refill waits at the manager, ahead of admissions, while a sequence is preempted here to feed it:
        # the other way round, the blocks would go to the next admission and the shortage would last.
        asking = self._actor.spawn(self._ask_refill(message))
        begin_s = clock.now()
        while message.wait_s and not asking.done():
            await asyncio.wait((asking,), timeout=GRACE_S)
            is_alone = self._scheduler.num_generating <= 1
            if clock.now() - begin_s >= (ALONE_GRACE_S if is_alone else GRACE_S) and not asking.done():
                self._scheduler.slab.is_exhausted = True
                self._on_change()
        blocks = await asking
        self._is_refilling = False
        if self._attachment.is_current(attachment):
            self._scheduler.slab.refill(blocks)
            self._refill_again_s = clock.now() + (0.0 if blocks else QUIET_S)
        self._on_change()  # Also after another attachment's: somebody may have come to lack a block meanwhile.

    async def _ask_refill(self, message: Refill) -> list[int]:
        try:
            # No deadline: blocks in an answer that came too late would be nobody's.
            return unpack_tokens((await self._manager.ask(message, timeout=FOREVER)).blocks)
        except BusError:
            await self._actor.node.clock.sleep(QUIET_S)  # The end of the attachment will say why.
            return []
