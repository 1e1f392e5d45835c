"""A running sequence goes on at another engine, with its KV.

Most of its KV is copied while it goes on where it is. Then it is held there, what came meanwhile is copied, and the
other engine starts behind its last token. Until that engine's first token is here, all that fails leaves the stream
where it was; and from then on, whoever iterates it reads from the other one. The tokens are the same either way.

No message has to arrive for that: only this router decides from whom a position's token is taken, the other engine
starts behind exactly those that were taken, and a hold ends by itself.
"""

import asyncio

from callboard.actors.move_protocol import Freeze, Frozen, Moved, NotMovable, SendKv, Thaw
from callboard.actors.protocol import Entry, PrepRecv, Sent, StartGenerate, Token
from callboard.bus import AskTimeout, BusError
from callboard.bus.calls import enter_call
from callboard.kv.tokens import num_tokens, pack_tokens, unpack_tokens

from .attempt import Attempt
from .engine_stream import EngineStream
from .generation import Generation
from .reservation import PrepRecvCall, Reserved

MOST_ROUNDS = 4
"""Copies that are made while the sequence goes on."""
SMALL = 32
"""Tokens: fewer than that are left for when it is held."""
COPY_S = 60.0
"""Limit of the copies that hold up nobody, and of waiting for blocks."""
SWITCH_S = 5.0
"""Limit from holding the sequence to the other engine's first token; then it goes on where it was."""
THAW_S = 2.0


async def hand_over(attempt: Attempt, source: Entry, target: Entry) -> Moved:
    """Move the generation that the attempt reads from ``source``; see Engine.hand_over."""
    generations = [each for each in attempt.generations if isinstance(each, Generation) and each.attempt is attempt]
    found = [each for each in generations if each.entry.name == source.name and each.has_begun]
    if not found:
        request_id = attempt.request.id
        raise NotMovable(request_id=request_id, reason=f"nothing of it has begun to be read from {source.name}")
    return await move(found[-1], target)


async def move(generation: Generation, target: Entry) -> Moved:
    """Move a generation. Raises BusError; then it goes on where it was."""
    attempt = generation.attempt
    if attempt.is_closed or not generation.has_begun:
        raise NotMovable(request_id=attempt.request.id, reason="it has ended")
    if generation.moving is not None:
        raise NotMovable(request_id=attempt.request.id, reason="it is being moved already")
    if target.name == generation.entry.name:
        raise NotMovable(request_id=attempt.request.id, reason=f"it runs on {target.name}")
    attempt.is_moved = True
    # A task of its own: whoever asks for it may be cancelled, and the generation may end under it.
    moving = generation.moving = attempt.spawn(_HandOver(generation, target).run())
    try:
        outcome: Moved | BusError = await asyncio.shield(moving)
    except asyncio.CancelledError:
        if moving.cancelled():
            raise NotMovable(request_id=attempt.request.id, reason="it ended meanwhile") from None
        moving.cancel()
        await asyncio.wait((moving,))
        raise
    finally:
        generation.moving = None
    if isinstance(outcome, BusError):
        raise outcome
    return outcome


class _HandOver:
    """One move of one generation."""

    def __init__(self, generation: Generation, target: Entry) -> None:
        self._generation = generation
        self._attempt = generation.attempt
        self._node = generation.attempt.node
        self._source = generation.entry
        self._target = target
        self._key = (generation.attempt.request.id, generation.message.attempt)
        self._num_copied = 0
        """Tokens whose KV is at the target."""
        self._num_bytes = 0
        self._lane = ""
        self._kv: Reserved | None = None
        """What is reserved for it at the target, so that the copies stay there."""

    async def run(self) -> Moved | BusError:
        """Move it; return what kept it from moving, if something did."""
        enter_call(self._attempt.call_served)
        try:
            async with asyncio.timeout(COPY_S):
                await self._begin()
                await self._copy_ahead()
            return await self._switch()
        except TimeoutError:
            return AskTimeout(f"request {self._key[0]} could not be moved to {self._target.name} in time")
        except BusError as error:
            return error
        except RuntimeError:
            if not self._attempt.is_closed:
                raise
            return self._refusal("its request has ended")
        finally:
            self._attempt.unpick(self._target.name)
            if self._kv is not None:
                self._attempt.release_later(self._kv.addr)

    async def _begin(self) -> None:
        """Wait for the first token: before it, there is nothing to be moved."""
        generation = self._generation
        if not generation.num_output_tokens:
            try:
                await generation.take()
                if not generation.num_output_tokens:
                    await generation.read_until(generation.position + 1)
            except StopAsyncIteration:
                raise self._refusal("it ended without a token") from None
            finally:
                generation.give_back()

    async def _copy_ahead(self) -> None:
        """Copy what is in place, while more comes."""
        for number in range(MOST_ROUNDS):
            tokens = unpack_tokens(self._generation.tokens)
            end = len(tokens) - 1  # That of the newest token is not computed yet.
            if number and end - self._num_copied <= SMALL:
                return
            kv = await self._reserve(pack_tokens(tokens[:end]), end, wait_s=COPY_S / 2)
            await self._send(kv, end)

    async def _switch(self) -> Moved:
        """Hold the sequence, copy the rest, and go on at the target."""
        generation, node = self._generation, self._node
        stream: EngineStream | None = None
        is_held = False
        try:
            async with asyncio.timeout(COPY_S):
                await generation.take()
            is_held = True
            async with asyncio.timeout(SWITCH_S):
                frozen = await self._freeze()
                try:
                    await generation.read_until(frozen.position)
                except StopAsyncIteration:
                    raise self._refusal("its stream ended") from None
                last_s = generation.read_s
                tokens = generation.tokens
                end = num_tokens(tokens) - 1
                kv = await self._reserve(tokens, end, wait_s=0.0)
                # Before the rest is sent: it takes the blocks in the moment in which all is there.
                stream = self._stream(tokens, end, kv, frozen.position)
                await stream.open()
                await self._send(kv, end)
                copied_s = node.clock.now()
                first: Token = await anext(stream.items)
            if first.position != frozen.position:
                raise self._refusal(f"{self._target.name} went on at {first.position}, not at {frozen.position}")
            moved = self._moved(frozen, num_tokens(tokens), last_s, copied_s)
            self._kv, own = None, stream
            is_held, stream = False, None
            await generation.switch(own, first, frozen.usage)
            return moved
        except StopAsyncIteration:
            raise self._refusal(f"{self._target.name} brought nothing") from None
        finally:
            if stream is not None:
                stream.record("the sequence went on where it was")
                await stream.close()
            if is_held:
                self._attempt.spawn_detached(self._thaw())
            generation.give_back()

    # ---- messages ------------------------------------------------------------------------------------------------

    async def _freeze(self) -> Frozen:
        message = Freeze(*self._key, 2 * SWITCH_S)
        with self._attempt.call("freeze", self._source):
            return await self._node.ref(self._source.address).ask(message, timeout=SWITCH_S)

    async def _thaw(self) -> None:
        """Let the sequence go on. If it does not hear of it, it does so by itself."""
        try:
            await self._node.ref(self._source.address).ask(Thaw(*self._key), timeout=THAW_S)
        except BusError:
            pass

    async def _send(self, kv: Reserved, end: int) -> None:
        """Have the KV that lacks of the first ``end`` tokens sent there."""
        if kv.begin < end:
            with self._attempt.call("hand_over", self._source) as span:
                sent: Sent = await self._node.ref(self._source.address).ask(
                    SendKv(*self._key, kv.addr, kv.begin, end), timeout=self._attempt.request.deadline
                )
                span.facts = {"num_bytes": sent.num_bytes, "lane": sent.lane, "num_reused_tokens": end - kv.begin}
            self._num_bytes += sent.num_bytes
            self._lane = sent.lane or self._lane
        self._num_copied = end

    async def _reserve(self, tokens: bytes, end: int, wait_s: float) -> Reserved:
        """Reserve room for all tokens, of whose first ``end`` the KV is to come."""
        # Each under an id of its own: a repeat of another is another's reservation.
        request_id = f"{self._key[0]}/{self._node.new_id()}"
        wait_s = min(wait_s, self._attempt.request.deadline)
        message = PrepRecv(request_id, self._key[1], tokens, end, wait_s, self._target.name)
        kv = await PrepRecvCall(self._target, self._attempt, message)
        before, self._kv = self._kv, kv
        if before is not None:  # Only now: what it held is held by the next one, too.
            self._attempt.release_later(before.addr)
        return kv

    def _stream(self, tokens: bytes, begin: int, kv: Reserved, position: int) -> EngineStream:
        sampling = self._generation.message.sampling
        message = StartGenerate(*self._key, tokens, sampling, begin, kv.addr, num_output_tokens=position)
        return EngineStream(self._target, self._attempt, message)

    # ---- outcomes ------------------------------------------------------------------------------------------------

    def _moved(self, frozen: Frozen, length: int, last_s: float, copied_s: float) -> Moved:
        num_gaps = frozen.position - self._generation.message.num_output_tokens - 1
        return Moved(
            self._key[0],
            self._source.name,
            self._target.name,
            self._num_bytes,
            self._lane,
            length,
            self._node.clock.now() - last_s,
            max(0.0, copied_s - last_s),
            frozen.usage.decode_s / num_gaps if num_gaps > 0 else None,
        )

    def _refusal(self, reason: str) -> NotMovable:
        return NotMovable(request_id=self._key[0], reason=reason)
