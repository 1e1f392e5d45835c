"""What an engine does when a sequence is to go on elsewhere, and when it is taken out of service.

A held sequence keeps its blocks and is in no step. The hold ends by itself, so that nothing hangs on a router that
died, or on a message that was lost; and two engines that go on with the same sequence harm nobody, because its reader
follows only one of them.
"""

import asyncio

from callboard.actors.actor import Actor
from callboard.actors.move_protocol import (
    Depart,
    Freeze,
    Frozen,
    GetOccupied,
    NotMovable,
    Occupied,
    SendHeld,
    SendKv,
    SetDraining,
    SetRoles,
    Thaw,
)
from callboard.actors.protocol import BadRequest, Done, Sent
from callboard.actors.registration import Registration
from callboard.bus.calls import enter_call, leave_call
from callboard.kv.tokens import pack_tokens

from .attachment import Attachment
from .config import EngineConfig
from .generation import Generation
from .scheduler import Scheduler

LONGEST_HOLD_S = 60.0
MOST_ROLES = 16
MOST_ROLE = 64
"""Characters."""


class Movable(Actor):
    """The part of an engine that holds sequences, has their KV sent, and drains. Engine sets the attributes."""

    config: EngineConfig
    scheduler: Scheduler
    attachment: Attachment
    registration: Registration
    is_draining = False
    """It is offered to no request any more."""
    _generations: dict[str, Generation]
    _stepped: asyncio.Event
    _started: asyncio.Event
    _wake: asyncio.Event

    def _carry_out(self) -> None:
        raise NotImplementedError

    # ---- one sequence --------------------------------------------------------------------------------------------

    async def on_freeze(self, message: Freeze) -> Frozen:
        if not 0.0 < message.hold_s <= LONGEST_HOLD_S:
            raise BadRequest(reason=f"a sequence is held for at most {LONGEST_HOLD_S:.0f} s, not {message.hold_s}")
        generation = self._decoding(message.request_id, message.attempt)
        sequence = generation.sequence
        number = sequence.num_holds = sequence.num_holds + 1
        self.spawn(self._thaw_later(generation, number, message.hold_s))
        if not sequence.is_held:
            sequence.is_held = True
            generation.held(self.node.clock.now())
        # It may be part of the step under way, and of none that begins after that.
        await self._stepped.wait()
        token = enter_call(None)  # What is carried out is of all sequences, not of this call.
        try:
            self._carry_out()
        finally:
            leave_call(token)
        if sequence.num_holds != number or not sequence.is_held:
            raise NotMovable(request_id=message.request_id, reason="it has been let go of meanwhile")
        self._decoding(message.request_id, message.attempt)
        return Frozen(sequence.num_output_tokens, generation.usage(self.node.clock.now()))

    def on_thaw(self, message: Thaw) -> Done:
        generation = self._find(message.request_id, message.attempt)
        if generation is not None:
            self._thaw(generation)
        return Done()

    def on_depart(self, message: Depart) -> Done:
        generation = self._find(message.request_id, message.attempt)
        if generation is not None:
            generation.depart()
        return Done()

    async def on_send_kv(self, message: SendKv) -> Sent:
        generation = self._decoding(message.request_id, message.attempt)
        sequence, config = generation.sequence, self.config
        if not 0 <= message.begin <= message.end <= sequence.num_computed_tokens:
            reason = f"the KV of {sequence.num_computed_tokens} tokens is in place, not of {message.end}"
            raise NotMovable(request_id=message.request_id, reason=reason)
        num_blocks = -(-message.end // config.block_size)
        held = SendHeld(
            message.request_id,
            message.attempt,
            config.name,
            sequence.sequence_id,
            pack_tokens(sequence.tokens[: message.end]),
            sequence.block_table[:num_blocks].tobytes(),
            message.kv,
            message.begin,
            message.end,
            self.attachment.named,
        )
        return await self.attachment.manager.ask(held)

    def _find(self, request_id: str, attempt: int) -> Generation | None:
        """Return the stream of a request's attempt, of several the last; None if there is none."""
        for generation in reversed(self._generations.values()):
            sequence = generation.sequence
            is_it = (sequence.request_id, generation.attempt) == (request_id, attempt) and not sequence.is_kv_only
            if is_it and not generation.call.ended:
                return generation
        return None

    def _decoding(self, request_id: str, attempt: int) -> Generation:
        """Return a stream whose sequence decodes. Raises NotMovable."""
        generation = self._find(request_id, attempt)
        if generation is None:
            raise NotMovable(request_id=request_id, reason=f"{self.name} has no such sequence, or no more")
        sequence = generation.sequence
        if sequence.finish_reason is not None:
            raise NotMovable(request_id=request_id, reason="it has just finished")
        if generation.needs_admission or not sequence.is_decoding:
            raise NotMovable(request_id=request_id, reason="it does not decode yet, or not again after a preemption")
        return generation

    def _thaw(self, generation: Generation) -> None:
        sequence = generation.sequence
        sequence.num_holds += 1
        if sequence.is_held:
            sequence.is_held = False
            if not sequence.is_paused:
                generation.resumed(self.node.clock.now())
            self._wake.set()

    async def _thaw_later(self, generation: Generation, number: int, seconds: float) -> None:
        await self.node.clock.sleep(seconds)
        if generation.sequence.num_holds == number:
            self._thaw(generation)

    # ---- the whole engine ----------------------------------------------------------------------------------------

    def on_set_draining(self, message: SetDraining) -> Occupied:
        self.is_draining = message.is_draining
        self._tell_state()
        return self._occupied()

    def on_get_occupied(self, message: GetOccupied) -> Occupied:
        return self._occupied()

    async def on_set_roles(self, message: SetRoles) -> Done:
        roles = tuple(dict.fromkeys(message.roles))
        if len(roles) > MOST_ROLES or not all(0 < len(role) <= MOST_ROLE for role in roles):
            raise BadRequest(reason=f"at most {MOST_ROLES} roles, of 1 to {MOST_ROLE} characters, are taken")
        await self._started.wait()
        self.registration.update(roles=roles)
        return Done()

    def _occupied(self) -> Occupied:
        generations = [g.sequence for g in self._generations.values() if not g.call.ended]
        num_sends = sum(sequence.is_kv_only for sequence in generations)
        return Occupied(len(generations) - num_sends, num_sends, self.is_draining)

    @property
    def state(self) -> str:
        """What the directory is told: ready, draining, or detached from its KV manager."""
        if not self.attachment.is_attached:
            return "detached"
        return "draining" if self.is_draining else "ready"

    def _tell_state(self) -> None:
        if self._started.is_set():
            self.registration.update(state=self.state)
