"""The sequences of one HTTP request: each a stream of tokens, all merged into one outbox."""

import asyncio
import contextlib
import logging
from array import array
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from callboard.actors.protocol import Generate, Token
from callboard.bus import BusError, Items
from callboard.bus.calls import enter_call

from .errors import ApiError, as_api_error
from .http_trace import HttpTrace
from .pace import Pace
from .responses import PromptTokensDetails, UsageReply
from .text import Piece, SequenceText

log = logging.getLogger("callboard.frontend")

ROOM = 64
"""Pieces that wait for the client's socket, at most; beyond it the bus stream is not read, and its credit runs out."""
LAST_WORDS_S = 1.0
"""How long a stream may take to end after its last token, before it is cancelled."""


class TokenGap(BusError):
    """Tokens that did not come: whoever left them out is as good as dead, for this sequence."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """One choice: what the router is asked, and the text made of its answer."""

    index: int
    prompt_index: int
    message: Generate
    text: SequenceText
    pace: Pace
    sent: "array[int]" = field(default_factory=lambda: array("i"))
    """The tokens that came, in order."""


@dataclass(frozen=True, slots=True)
class Item:
    """A piece of one choice, or the error that ends the request."""

    index: int
    piece: Piece | ApiError


class Outbox:
    """Items in the order they came, of all sequences. Holds at most ROOM; whoever puts more waits."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()

    async def put(self, item: Item) -> None:
        """Add an item, once there is room."""
        while len(self._items) >= ROOM:
            self._drained.clear()
            await self._drained.wait()
        self._items.append(item)
        self._filled.set()

    def fail(self, error: ApiError) -> None:
        """End the request with ``error``, room or not."""
        self._items.append(Item(0, error))
        self._filled.set()

    async def take(self) -> list[Item]:
        """Return all that is here, at least one item: what came in one pass of the loop is written at once."""
        while not self._items:
            self._filled.clear()
            await self._filled.wait()
        items = list(self._items)
        self._items.clear()
        self._drained.set()
        return items


Run = Callable[[], Awaitable[ApiError | None]]
"""Brings the tokens of one sequence; returns what is wrong with the end, or raises it."""


async def run_sequence(sequence: Sequence, run: Run, outbox: Outbox, trace: HttpTrace) -> None:
    """Generate one sequence into the outbox. Ends with an item that has a finish reason, or with an error.

    A task of its own: the request's root is current in all of it.
    """
    enter_call(trace.root(sequence.message.request_id))
    error: ApiError | None = None
    try:
        error = await run()
    except Exception as failure:
        if not isinstance(failure, BusError | ApiError):
            extra = {"request_id": sequence.message.request_id}
            log.error("the request failed here", exc_info=failure, extra=extra)
        error = as_api_error(failure)
    if error is not None:
        await outbox.put(Item(sequence.index, error))


async def read_tokens(sequence: Sequence, tokens: Items[Token], outbox: Outbox) -> ApiError | None:
    """Make pieces of the tokens of a stream until one is the last; return what is wrong with the end.

    A token that came before, from another, is left out. Raises TokenGap, BusError.
    """
    # Hot: once per token (bench/serve.py).
    sent = sequence.sent
    async for token in tokens:
        if token.position != len(sent):
            if token.position < len(sent):
                continue
            raise TokenGap(f"token {token.position} came where {len(sent)} was due")
        sent.append(token.id)
        sequence.pace.token()
        if token.finish_reason == "abort":
            return ApiError(503, "The request was aborted on the server.", code="aborted")
        piece = sequence.text.push(token)
        if piece:
            await outbox.put(Item(sequence.index, piece))
        if piece.finish_reason is not None:
            return None
    return ApiError(500, "The router ended the answer before it was finished.", code="incomplete")


async def last_words(sequence: Sequence, tokens: Items[Token]) -> None:
    """Let whoever brought the last token get to its end (a router's script to its last line) before it is cancelled."""
    if not sequence.text.is_cut:
        with contextlib.suppress(TimeoutError, BusError):
            async with asyncio.timeout(LAST_WORDS_S):
                async for _ in tokens:
                    pass


def usage_of(sequences: list[Sequence], prompt_lengths: list[int]) -> UsageReply:
    """Return what a request cost. A prompt counts once, however many choices it has.

    A prompt's cached tokens are the fewest that one of its choices found: the others may have found the first one's.
    """
    cached: dict[int, int] = {}
    for sequence in sequences:
        usage = sequence.text.usage
        if usage is not None:
            known = cached.get(sequence.prompt_index, usage.num_cached_tokens)
            cached[sequence.prompt_index] = min(known, usage.num_cached_tokens)
    num_prompt = sum(prompt_lengths)
    num_output = sum(sequence.text.num_tokens for sequence in sequences)
    details = PromptTokensDetails(sum(cached.values())) if cached else None
    return UsageReply(num_prompt, num_output, num_prompt + num_output, details)
