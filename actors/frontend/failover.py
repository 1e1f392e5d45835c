"""One sequence over several routers: when one dies or is out of reach, another goes on behind the last token.

What was sent stays sent: the next router gets the prompt with the sent tokens behind it and continues at their
position, so the text made of them (stop strings, logprobs, half characters) never hears of it.
"""

import logging

import msgspec

from callboard.actors.protocol import ATTEMPTS_EACH, Generate
from callboard.bus import ActorDied, Address, AskTimeout, BusError, LinkLost, Node, UnknownActor, current_call
from callboard.kv.tokens import pack_tokens

from .errors import ApiError, all_full, no_router, refusal_name
from .generation import Outbox, Sequence, TokenGap, last_words, read_tokens
from .http_trace import HttpTrace
from .routers import RouterCounts, Routers

log = logging.getLogger("callboard.frontend")

MOST_DEATHS = 3
"""Routers that may die under a request without a token from any: if more do, it may be the request that kills them."""
MOST_NOTE = 200
"""Characters that a record keeps of why a router was lost."""
PASSING = ("QueueFull", "OutOfBlocks", "NoEngine")
"""Refusals after which who has begun waits and asks again: it is not sent away because others came."""


class Failover:
    """One sequence, asked of one router after the other until one has brought it to its end."""

    def __init__(
        self,
        sequence: Sequence,
        node: Node,
        routers: Routers,
        trace: HttpTrace,
        *,
        timeout_s: float,
        patience_s: float,
    ) -> None:
        """``timeout_s`` is for all of it; ``patience_s`` for there being nobody to ask, each time anew."""
        self._sequence = sequence
        self._node = node
        self._routers = routers
        self._trace = trace
        self._timeout_s = timeout_s
        self._until = node.clock.now() + timeout_s
        self._patience_s = patience_s
        self._patient_until = node.clock.now() + patience_s
        self._number = 0
        """Of routers that were asked."""
        self._num_deaths = 0
        """Since the last token."""
        self._has_begun = False
        self._is_desperate = False
        """The router that is asked was lost just now, and there is no other."""
        self._full: dict[str, BusError] = {}
        """What those said that can take no more at present, by the router's name."""
        self._lost: BusError | None = None
        self._lost_s = 0.0

    async def run(self, outbox: Outbox) -> ApiError | None:
        """Put all pieces into the outbox; return what is wrong with the end. Raises BusError, ApiError."""
        while True:
            router = await self._next_router()
            num_before = len(self._sequence.sent)
            with self._routers.asking(router) as counts:
                try:
                    error = await self._ask(router, outbox)
                except BusError as failure:
                    if len(self._sequence.sent) > num_before:
                        self._num_deaths, self._has_begun = 0, True
                    self._go_on_after(failure, router, counts)
                else:
                    self._routers.turnover.ended(self._node.clock.now())
                    return error

    async def _ask(self, router: Address, outbox: Outbox) -> ApiError | None:
        """Read what one router brings. Leaving the stream cancels all that it does, where it still lives."""
        message = self._message()
        if self._lost is not None:
            why, self._lost = str(self._lost), None
            self._node.note(current_call(), "reroute", self._lost_s, why=why[:MOST_NOTE], to=router.actor)
        async with self._node.ref(router).stream(message, timeout=self._left_s()) as tokens:
            if not self._number:
                self._trace.opened()
            self._number += 1
            error = await read_tokens(self._sequence, tokens, outbox)
            if error is None:
                await last_words(self._sequence, tokens)
            return error

    def _message(self) -> Generate:
        message, sent = self._sequence.message, self._sequence.sent
        if not self._number:
            return message
        prompt = message.prompt + pack_tokens(sent)
        attempt = self._number * ATTEMPTS_EACH
        return msgspec.structs.replace(message, prompt=prompt, num_output_tokens=len(sent), attempt=attempt)

    async def _next_router(self) -> Address:
        """Return whom to ask; wait while there is nobody. Raises ApiError, AskTimeout, and how the last one ended."""
        routers, clock, has_waited = self._routers, self._node.clock, False
        while True:
            left_s, patient_s = self._left_s(), self._patient_until - clock.now()
            self._is_desperate = False
            if (router := routers.pick(self._full)) is not None:
                return router
            may_wait = self._has_begun or not self._full
            if has_waited or not may_wait:
                self._is_desperate = True
                if (router := routers.pick(self._full, is_desperate=True)) is not None:
                    return router
            if not may_wait:
                raise all_full(next(iter(self._full.values())), routers.turnover.refused(clock.now()))
            if patient_s <= 0:
                raise self._lost or next(iter(self._full.values()), None) or no_router(routers.missing())
            begin_s = clock.now()
            try:
                await routers.change(min(left_s, patient_s))
            finally:
                self._node.note(current_call(), "wait", begin_s)
            has_waited = True
            self._full.clear()

    def _left_s(self) -> float:
        left_s = self._until - self._node.clock.now()
        if left_s <= 0:
            raise AskTimeout(f"it was not done within {self._timeout_s:.3g} s")
        return left_s

    def _go_on_after(self, failure: BusError, router: Address, counts: RouterCounts) -> None:
        """Note why a router did not bring it to its end. Raises ``failure`` if no other would."""
        if _is_lost(failure, router):
            counts.num_lost += 1
            self._was_lost(router, failure)
        elif refusal_name(failure) == "QueueFull" or (self._has_begun and refusal_name(failure) in PASSING):
            counts.num_refused += 1
            self._full[router.actor] = failure
        else:
            raise failure

    def _was_lost(self, router: Address, failure: BusError) -> None:
        self._routers.suspect(router)
        self._lost, self._lost_s, self._has_begun = failure, self._node.clock.now(), True
        if not (self._is_desperate and isinstance(failure, LinkLost)):  # Else it was not even heard.
            self._patient_until = self._lost_s + self._patience_s
        # A link that broke, or a silence, is no fault of the request.
        self._num_deaths += isinstance(failure, ActorDied | TokenGap)
        if self._num_deaths >= MOST_DEATHS:
            raise failure
        where = f" behind {len(self._sequence.sent)} tokens" if self._sequence.sent else ""
        extra = {"request_id": self._sequence.message.request_id}
        log.warning("another router is asked%s after %r", where, failure, extra=extra)


def _is_lost(failure: BusError, router: Address) -> bool:
    """Return whether it is the router that is gone, or does not do its duty, and not an engine behind it."""
    if isinstance(failure, UnknownActor):
        return bool(failure.actor == router.actor and failure.node == router.node)
    return isinstance(failure, ActorDied | LinkLost | TokenGap) and not failure.is_relayed
