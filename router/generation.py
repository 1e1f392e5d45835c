"""A start_generate as a script reads it."""

import sys
from contextlib import AsyncExitStack
from typing import Any, Self

import msgspec

from callboard.actors.protocol import Entry, StartGenerate, Token, Usage

from .attempt import Attempt, Span


class Generation:
    """The tokens of a start_generate, once. Sent when the first token is asked for; ends with the script's run."""

    def __init__(self, entry: Entry, attempt: Attempt, message: StartGenerate) -> None:
        self._entry = entry
        self._attempt = attempt
        self._message = message
        self._scope = AsyncExitStack()
        self._items: Any = None
        self._span: Span | None = None
        self._is_over = False
        self._unadopted = message.kv
        """The reservation, until the first token shows that the engine has it."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        # Hot: once per token (bench/serve.py).
        if self._is_over:
            raise StopAsyncIteration
        try:
            if self._items is None:
                await self._start()
            token: Token = await anext(self._items)
        except StopAsyncIteration:
            await self._end("it ended without a finished token")
            raise
        except BaseException:
            self._is_over = True
            self._attempt.closed(self.aclose)
            await self._scope.__aexit__(*sys.exc_info())
            raise
        if self._unadopted is not None:
            self._attempt.adopted(self._unadopted)
            self._unadopted = None
        if token.finish_reason is None:
            return token
        self._note_usage(token)
        return msgspec.structs.replace(token, usage=self._usage_of_request(token.usage))

    async def aclose(self) -> None:
        """End the generation on its engine. A repeat does nothing."""
        await self._end("cancelled")

    async def _end(self, error: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._attempt.closed(self.aclose)
            if self._span is not None and not self._span.is_recorded:
                self._span.error = error
            await self._scope.aclose()

    async def _start(self) -> None:
        call = self._attempt.call("start_generate", self._entry)
        self._span = self._scope.enter_context(call)
        self._attempt.opened(self.aclose)
        stream = self._attempt.node.ref(self._entry.address).stream(
            self._message, timeout=self._attempt.request.deadline
        )
        self._items = await self._scope.enter_async_context(stream)

    def _usage_of_request(self, usage: Usage | None) -> Usage | None:
        """Return what the whole request cost: KV that was computed elsewhere and sent here was not cached."""
        num_sent = self._attempt.num_computed_tokens
        if usage is None or not num_sent:
            return usage
        return msgspec.structs.replace(
            usage,
            num_cached_tokens=max(0, usage.num_cached_tokens - num_sent),
            num_computed_tokens=usage.num_computed_tokens + num_sent,
        )

    def _note_usage(self, token: Token) -> None:
        assert self._span is not None
        if token.usage is not None:
            self._span.facts = {
                "num_computed_tokens": token.usage.num_computed_tokens,
                "num_reused_tokens": token.usage.num_cached_tokens,
            }
        # Now rather than when the stream closes: a client that has its last token may ask for the record at once.
        self._attempt.record(self._span)
