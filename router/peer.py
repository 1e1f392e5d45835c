"""Another router, to which a script hands a request on."""

from contextlib import AsyncExitStack
from typing import Any, Self

from callboard.actors.protocol import BadRequest, Entry, Generate, Token

from .attempt import Attempt
from .errors import NoRouter
from .request import Request

HAND_ON_BITS = 20
"""Attempts of a router count below 2**20, and those of the next one begin above: no two name their verbs alike."""
WAIT_S = 5.0
"""How long a router is waited for that is not there, or has just failed."""
LOOK_S = 0.05
MOST_ATTEMPT = 2**62
"""Beyond, routers hand a request on to each other in a circle."""


class Peer:
    """A router of the fleet, for one run of a script."""

    def __init__(self, name: str, attempt: Attempt) -> None:
        self.name: str = name
        """The router's name in the fleet."""
        self._attempt = attempt

    def generate(self, request: Request) -> "HandedOn":
        """Have its script serve the request: ``async for token in fleet.router("other").generate(request)``.

        It recovers what dies under it. If it dies itself, this router's script runs again. One that is not there is
        waited for a little. Raises NoRouter, and BadRequest where routers hand a request on in a circle.
        """
        attempt = (request.attempt + 1) << HAND_ON_BITS
        if attempt > MOST_ATTEMPT:
            raise BadRequest(reason=f"request {request.id} was handed on from router to router too often")
        message = Generate(
            request.id,
            request.model,
            request.packed_prompt,
            request.sampling,
            request.priority,
            dict(request.headers),
            request.num_output_tokens,
            attempt,
        )
        return HandedOn(self.name, self._attempt, message)

    def __repr__(self) -> str:
        return f"Peer({self.name})"


class HandedOn:
    """The tokens of another router, once. Sent when the first is asked for; ends with the script's run."""

    def __init__(self, router: str, attempt: Attempt, message: Generate) -> None:
        self._router = router
        self._attempt = attempt
        self._message = message
        self._scope = AsyncExitStack()
        self._items: Any = None
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        if self._is_over:
            raise StopAsyncIteration
        try:
            if self._items is None:
                await self._start()
            token: Token = await anext(self._items)
        except BaseException as error:
            await self._end(error)
            raise
        return token

    async def aclose(self) -> None:
        """End it at the other router. A repeat does nothing."""
        await self._end(None)

    async def _start(self) -> None:
        entry = await self._found()
        self._scope.enter_context(self._attempt.call("generate", entry))
        self._attempt.opened(self.aclose)
        timeout = self._attempt.request.deadline
        stream = self._attempt.node.ref(entry.address).stream(self._message, timeout=timeout)
        self._items = await self._scope.enter_async_context(stream)

    async def _found(self) -> Entry:
        """Return where the router is, once it is there, and did not fail just now. Raises NoRouter."""
        attempt, clock, view = self._attempt, self._attempt.node.clock, self._attempt.shared.view
        until = clock.now() + min(WAIT_S, attempt.request.deadline / 2)
        while True:
            entry = view.get(self._router)
            is_router = entry is not None and entry.kind == "router"
            if entry is not None and is_router and attempt.loads.suspected_until(entry, clock.now()) is None:
                return entry
            if clock.now() >= until or (entry is not None and not is_router):
                known = ", ".join(each.name for each in view.entries("router"))
                raise NoRouter(name=self._router, known=known)
            await clock.sleep(LOOK_S)

    async def _end(self, error: BaseException | None) -> None:
        if not self._is_over:
            self._is_over = True
            self._attempt.closed(self.aclose)
            if error is None or isinstance(error, StopAsyncIteration):
                await self._scope.aclose()
            else:
                await self._scope.__aexit__(type(error), error, error.__traceback__)
