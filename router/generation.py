"""A start_generate as a script reads it: one run of tokens, also where it passes between engines (handover.py)."""

import asyncio
import sys
from array import array
from collections import deque
from typing import Self

import msgspec

from callboard.actors.protocol import Entry, StartGenerate, Token, Usage
from callboard.bus import BusError, LinkLost
from callboard.kv.tokens import pack_tokens

from .attempt import Attempt
from .engine_stream import EngineStream


class Generation:
    """The tokens of a start_generate, once. Sent when the first token is asked for; ends with the script's run."""

    def __init__(self, entry: Entry, attempt: Attempt, message: StartGenerate) -> None:
        self.attempt = attempt
        self.message = message
        self.is_over = False
        self.moving: asyncio.Task[object] | None = None
        """The hand-over that is under way."""
        self.read_s = 0.0
        """When the last token was read from an engine, on the node's clock."""
        self._stream = EngineStream(entry, attempt, message)
        self._now = attempt.node.clock.now
        self._output: array[int] = array("i")
        self._ahead: deque[Token] = deque()
        """Tokens that a hand-over has read, and the script not yet."""
        self._spent: Usage | None = None
        """What it has cost on engines before this one."""
        self._is_finished = False
        """The script has the last token."""
        self._is_reading = False
        self._is_taken = False
        """A hand-over reads, and the script waits for it."""
        self._changed: asyncio.Future[None] | None = None

    @property
    def entry(self) -> Entry:
        """The engine that it comes from now."""
        return self._stream.entry

    @property
    def has_begun(self) -> bool:
        """Whether it was sent, and has not ended."""
        return self._stream.items is not None and not self.is_over

    @property
    def position(self) -> int:
        """The position of the next token to be read."""
        return self.message.num_output_tokens + len(self._output)

    @property
    def num_output_tokens(self) -> int:
        """Tokens that were read."""
        return len(self._output)

    @property
    def tokens(self) -> bytes:
        """The prompt, and all of the output that was read, as int32 bytes."""
        return self.message.prompt + pack_tokens(self._output)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        # Hot: once per token (bench/serve.py).
        if self.is_over:
            raise StopAsyncIteration
        if self._is_taken or self._ahead:
            token = await self._next_ahead()
            if token is not None:
                return await self._given(token)
        try:
            if self._stream.items is None:
                await self._start()
            token = await self.read()
        except StopAsyncIteration:
            await self._end("it ended without a finished token")
            if self._is_finished:
                raise
            # What is lost on the way counts as a death, here as where a stream breaks: it is no fault of the script.
            raise LinkLost(f"{self.entry.name} ended a stream before its last token") from None
        except BaseException as error:
            self.is_over = True
            self._forget()
            await self._end_hand_over()
            await self._stream.close(*sys.exc_info())
            if self._is_finished and isinstance(error, BusError):
                raise StopAsyncIteration from None  # Only the word that this was all did not arrive.
            raise
        return token if token.finish_reason is None else await self._given(token)

    async def aclose(self) -> None:
        """End the generation on its engine. A repeat does nothing."""
        await self._end("cancelled")

    async def read(self) -> Token:
        """Read the next token from the engine. For one reader at a time."""
        self._is_reading = True
        try:
            token: Token = await anext(self._stream.items)
        finally:
            self._is_reading = False
            if self._changed is not None:
                self._notify()
        self._note(token)
        return token

    # ---- the side of the hand-over -------------------------------------------------------------------------------

    async def take(self) -> None:
        """Become the only reader: wait until the script has the token that it waits for. To be given back."""
        self._is_taken = True
        while self._is_reading:
            await self._change()

    async def read_until(self, position: int) -> None:
        """Read all tokens before ``position``, and leave them to the script. Only once it is taken."""
        while self.position < position:
            self._put(await self.read())

    def give_back(self) -> None:
        """Let the script read again. A repeat does nothing."""
        self._is_taken = False
        self._notify()

    async def switch(self, stream: EngineStream, first: Token, spent: Usage) -> None:
        """Go on with another engine's stream, of which ``first`` was read; ``spent`` is the bill of the one before."""
        before, self._stream = self._stream, stream
        self._spent = _sum(self._spent, spent)
        self._note(first)
        self._put(first)
        self.give_back()
        before.record(num_computed_tokens=spent.num_computed_tokens, num_reused_tokens=spent.num_cached_tokens)
        await before.depart()

    # ---- inside --------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self.attempt.opened(self.aclose)
        self.attempt.generations[self] = None
        await self._stream.open()

    def _note(self, token: Token) -> None:
        self._output.append(token.id)
        self.read_s = self._now()
        if self._stream.unadopted is not None:
            self._stream.has_brought_a_token()

    def _put(self, token: Token) -> None:
        self._ahead.append(token)
        self._notify()

    async def _next_ahead(self) -> Token | None:
        """Return the next token that the hand-over has read; None if there is none and the script is to read on."""
        while self._is_taken and not self._ahead:
            await self._change()
        return self._ahead.popleft() if self._ahead else None

    async def _given(self, token: Token) -> Token:
        """Return a token as the script gets it: the last one with the bill of the whole request."""
        if token.finish_reason is None:
            return token
        self._is_finished = True
        usage = token.usage
        if usage is not None:
            # Now rather than when the stream closes: who has the last token may ask for the record at once.
            self._stream.record(
                num_computed_tokens=usage.num_computed_tokens, num_reused_tokens=usage.num_cached_tokens
            )
        else:
            self._stream.record()
        return msgspec.structs.replace(token, usage=self._usage_of_request(usage))

    def _usage_of_request(self, usage: Usage | None) -> Usage | None:
        """Return what the whole request cost: KV that was computed elsewhere and sent here was not cached."""
        if usage is None:
            return None
        usage = _sum(self._spent, usage)
        num_sent = self.attempt.num_computed_tokens
        if not num_sent:
            return usage
        return msgspec.structs.replace(
            usage,
            num_cached_tokens=max(0, usage.num_cached_tokens - num_sent),
            num_computed_tokens=usage.num_computed_tokens + num_sent,
        )

    async def _end(self, error: str) -> None:
        if not self.is_over:
            self.is_over = True
            self._forget()
            await self._end_hand_over()
            self._stream.record(error)
            await self._stream.close()

    def _forget(self) -> None:
        self.attempt.closed(self.aclose)
        self.attempt.generations.pop(self, None)
        self._notify()

    async def _end_hand_over(self) -> None:
        """End the hand-over that is under way, unless this is it."""
        moving = self.moving
        if moving is not None and moving is not asyncio.current_task():
            moving.cancel()
            await asyncio.wait((moving,))

    async def _change(self) -> None:
        if self._changed is None or self._changed.done():
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._changed)  # Others may wait for it, too.

    def _notify(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
        self._changed = None


def _sum(before: Usage | None, usage: Usage) -> Usage:
    """Return what a sequence has cost that moved: what is in place on the second engine came from the first."""
    if before is None:
        return usage
    return Usage(
        num_prompt_tokens=usage.num_prompt_tokens,
        num_cached_tokens=before.num_cached_tokens,
        num_computed_tokens=before.num_computed_tokens + usage.num_computed_tokens,
        num_preemptions=before.num_preemptions + usage.num_preemptions,
        queue_s=before.queue_s,
        prefill_s=before.prefill_s,
        decode_s=before.decode_s + usage.queue_s + usage.prefill_s + usage.decode_s,
    )
