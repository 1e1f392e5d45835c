"""Attempts: a request's script runs again when an engine or a KV manager under it dies, and goes on where it was.

A later attempt's prompt holds the tokens that were sent already, and says how many, so that engines go on at their
position, with the limits, penalties and noise of the whole output. Whoever reads gets every token once.
"""

import asyncio
import logging
from array import array
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from callboard.actors.protocol import Generate, Token
from callboard.bus import UnknownActor
from callboard.kv.layout import OutOfBlocks, StaleReservation
from callboard.kv.tokens import pack_tokens

from .attempt import RETRIED
from .errors import NoEngine
from .in_flight import Admitted
from .patience import Patience
from .request import Request
from .running import run_script
from .shared import Shared
from .swap.routes import Routes

log = logging.getLogger("callboard.router")

NUM_ATTEMPTS = 3
"""Attempts that may end with a death, one after another, without a new token: it may be the request that kills."""
RESTARTING = (UnknownActor, StaleReservation)
"""What is met while processes come back: an engine that its KV manager does not know yet, another epoch."""


class Recovery:
    """One request, over all its attempts."""

    def __init__(
        self,
        shared: Shared,
        routes: Routes,
        message: Generate,
        admitted: Admitted,
        *,
        patience_s: float,
        is_fleet_starting: bool,
    ) -> None:
        self._shared = shared
        self._routes = routes
        self._script = routes.choose(message)
        self._message = message
        self._admitted = admitted
        self._deadline = admitted.deadline
        self._patience_s = patience_s
        self._is_fleet_starting = is_fleet_starting
        self._sent: array[int] = array("i")
        self._number = message.attempt
        self._num_in_vain = 0
        """Attempts since the last token that was sent."""

    async def tokens(self, begin_s: float) -> AsyncGenerator[Token, None]:
        """Run the script until it has succeeded, or fails for good. ``begin_s``: when the request came."""
        clock = self._shared.node.clock
        patience = self._new_patience()
        while True:
            num_before = len(self._sent)
            request, is_finished = self._request(), False
            try:
                run = run_script(self._shared, self._routes, self._script, request, self._admitted, patience, begin_s)
                async with aclosing(run) as tokens:
                    async for token in tokens:
                        self._sent.append(token.id)
                        is_finished = token.finish_reason is not None
                        yield token
                return
            except NoEngine:
                if is_finished:
                    return
                patience = self._after(num_before, patience)
                if not await patience.waits_for_engine(request, is_retry=self._is_retry):
                    raise
            except RETRIED as error:
                if is_finished:
                    return  # Its client has all of it: what a script does after that is not worth another attempt.
                patience = self._after(num_before, patience)
                if isinstance(error, RESTARTING):
                    # The request has no part in that: only time counts.
                    if not await patience.pauses(request):
                        raise
                else:
                    self._num_in_vain += 1
                    if self._num_in_vain >= NUM_ATTEMPTS:
                        raise
                self._again(repr(error), request)
            except OutOfBlocks as error:
                if is_finished:
                    return
                patience = self._after(num_before, patience)
                # Before the first token that is an answer. Who has begun is not sent away because others came.
                if not (self._sent or request.num_output_tokens) or not await patience.pauses(request):
                    raise
                self._again(repr(error), request)
            begin_s = clock.now()

    def _request(self) -> Request:
        """Return the request as the next attempt's script sees it."""
        message = self._message
        if self._sent:
            message = msgspec.structs.replace(
                message,
                prompt=message.prompt + pack_tokens(self._sent),
                num_output_tokens=message.num_output_tokens + len(self._sent),
            )
        return Request(message, attempt=self._number, remaining_s=self._deadline.remaining_s)

    @property
    def _is_retry(self) -> bool:
        return self._number > self._message.attempt

    def _new_patience(self) -> Patience:
        return Patience(self._shared, patience_s=self._patience_s, is_fleet_starting=self._is_fleet_starting)

    def _after(self, num_before: int, patience: Patience) -> Patience:
        """Return what patience there is after an attempt: all of it, if tokens came.

        Raises CancelledError where nobody waits: the script swallowed its own, and a death came behind it.
        """
        if self._admitted.call.ended:
            raise asyncio.CancelledError
        if len(self._sent) == num_before:
            return patience
        self._num_in_vain = 0
        return self._new_patience()

    def _again(self, why: str, request: Request) -> None:
        self._number += 1
        self._script = self._routes.again(self._script)
        where = f" behind {len(self._sent)} tokens" if self._sent else ""
        log.warning("attempt %d follows%s after %s", self._number + 1, where, why, extra={"request_id": request.id})
