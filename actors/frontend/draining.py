"""How one of several frontends leaves without a request lost: others accept, and it stays until all is answered."""

from collections.abc import Callable, Collection, Coroutine
from contextlib import ExitStack
from typing import Any

from callboard.actors.frontend_protocol import CannotDrain, Drained
from callboard.actors.registration import Registration
from callboard.bus.clock import Clock

from .http import HttpServer

LOOK_S = 0.05
"""Between two looks whether there is still something to do."""
LINGER_S = 1.0
"""How long it waits, once there is nothing, for the next requests of clients that are connected: their last ones."""
RESUME_S = 10.0
"""After so long it accepts connections again, unless it has ended: whoever had it drained may have died."""


class Draining:
    """The drains of one frontend, one at a time. ``others`` names who accepts connections meanwhile."""

    def __init__(
        self,
        name: str,
        server: HttpServer,
        registration: Registration,
        clock: Clock,
        *,
        others: Callable[[], Collection[str]],
        spawn: Callable[[Coroutine[Any, Any, Any]], object],
    ) -> None:
        self._name = name
        self._server = server
        self._registration = registration
        self._clock = clock
        self._others = others
        self._spawn = spawn
        self._is_drained = False

    async def drain(self) -> Drained:
        """Leave, and return once nothing is to be done; being cancelled undoes it. Raises CannotDrain."""
        if self._is_drained:
            raise CannotDrain(frontend=self._name, reason="it is being drained already")
        self._see_others()
        num_requests = self._server.num_requests
        with ExitStack() as stack:
            self._is_drained = True
            stack.callback(self._resume)
            self._registration.update(state="draining")
            stack.enter_context(self._server.leaving())
            idle_s = 0.0
            while idle_s < LINGER_S:
                await self._clock.sleep(LOOK_S)
                self._see_others()  # They may have died, or be drained at the same time.
                idle_s = 0.0 if self._server.is_busy else idle_s + LOOK_S
            self._server.close_idle()  # A request that came now would have to end within the grace of a stop.
            self._spawn(self._resume_later(stack.pop_all()))
        return Drained(num_requests, RESUME_S)

    def _see_others(self) -> None:
        if not self._others():
            raise CannotDrain(frontend=self._name, reason="no other one would accept connections")

    async def _resume_later(self, stack: ExitStack) -> None:
        with stack:
            await self._clock.sleep(RESUME_S)

    def _resume(self) -> None:
        self._is_drained = False
        self._registration.update(state="ready")
