"""One engine's stream of tokens, from its start_generate to its end, with the record of it."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

from callboard.actors.move_protocol import Depart
from callboard.actors.protocol import Entry, StartGenerate
from callboard.bus import BusError

from .attempt import Attempt, Span

DEPART_S = 1.0
"""How long an engine may take to end a stream that is read elsewhere."""


class EngineStream:
    """A start_generate that was sent. Whoever opens it closes it."""

    def __init__(self, entry: Entry, attempt: Attempt, message: StartGenerate) -> None:
        self.entry = entry
        self.message = message
        self.items: Any = None
        """What is read; None until it was opened."""
        self.unadopted = message.kv
        """The reservation, until the first token shows that the engine has it."""
        self._attempt = attempt
        self._scope = AsyncExitStack()
        self._span: Span | None = None

    async def open(self) -> None:
        """Send it."""
        self._span = self._scope.enter_context(self._attempt.call("start_generate", self.entry))
        stream = self._attempt.node.ref(self.entry.address).stream(self.message, timeout=self._attempt.request.deadline)
        self.items = await self._scope.enter_async_context(stream)

    def has_brought_a_token(self) -> None:
        """Note that the engine has the blocks: the first token shows it."""
        if self.unadopted is not None:
            self._attempt.adopted(self.unadopted)
            self.unadopted = None

    async def depart(self) -> None:
        """Have the engine end it in order, because it is read from another one now; then close it, whatever comes."""
        message = Depart(self.message.request_id, self.message.attempt)
        try:
            async with asyncio.timeout(DEPART_S):
                await self._attempt.node.ref(self.entry.address).ask(message)
                async for _ in self.items:
                    pass
        except (BusError, TimeoutError):
            pass  # Leaving it does the same, only that it looks as if somebody had given up.
        finally:
            await self.close()

    def record(self, error: str = "", **facts: Any) -> None:
        """Keep the record of it as it is now. A repeat does nothing."""
        if self._span is not None and not self._span.is_recorded:
            self._span.error = error
            self._span.facts = facts
            self._attempt.record(self._span)

    async def close(self, *failure: Any) -> None:
        """End it on its engine; ``failure`` is what ``sys.exc_info`` says, if it broke. A repeat does nothing."""
        if failure:
            await self._scope.__aexit__(*failure)
        else:
            await self._scope.aclose()
