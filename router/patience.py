"""How long a request waits for an engine that is not there yet."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from callboard.actors.protocol import Entry, View
from callboard.bus import current_call

from .request import Request
from .shared import Shared

PAUSE_S = 0.1
"""Between two attempts while pools are full, or a process is coming back."""


class Patience:
    """One request's allowance of waiting, over all its attempts. What it waits is in the request's records."""

    def __init__(self, shared: Shared, *, patience_s: float, is_fleet_starting: bool) -> None:
        self._view = shared.view
        self._loads = shared.loads
        self._node = shared.node
        self._clock = shared.node.clock
        self._until = self._clock.now() + patience_s
        self._is_fleet_starting = is_fleet_starting

    async def waits_for_first_view(self, request: Request) -> None:
        """Wait until the directory has answered once; without an answer the fleet is empty."""
        if not self._view.has_view:
            with self._waiting():
                await self._wait(request, lambda _: True, self._left(request))

    async def waits_for_engine(self, request: Request, *, is_retry: bool) -> bool:
        """Wait until other engines of the model are ready than now; return False if that is not to be expected."""
        with self._waiting():
            return await self._waits_for_engine(request, is_retry)

    async def pauses(self, request: Request) -> bool:
        """Wait a little, for blocks that others give back or a process that comes back; return False if it is over."""
        if self._left(request) <= 0:
            return False
        with self._waiting():
            await self._clock.sleep(min(PAUSE_S, self._left(request)))
        return True

    def expects_engines(self, request: Request) -> bool:
        """Return whether others than are ready now may still come, and the request is to wait for them."""
        is_coming = bool(self._paroles(request, self._clock.now())) or self._is_starting(request)
        return is_coming and self._left(request) > 0

    async def _waits_for_engine(self, request: Request, is_retry: bool) -> bool:
        now = self._clock.now()
        paroles = self._paroles(request, now)  # Looked at once: one that ends meanwhile is not waited for longer.
        is_coming = is_retry or bool(paroles) or self._is_starting(request)
        left = self._left(request)
        if not is_coming or left <= 0:
            return False
        before = self._offered(request)
        next_parole = min((until - now for until in paroles), default=left)
        await self._wait(request, lambda _: self._offered(request) != before, min(left, next_parole))
        return True

    def _entries(self, request: Request) -> list[Entry]:
        return [entry for entry in self._view.entries("engine") if entry.model == request.model]

    def _is_starting(self, request: Request) -> bool:
        states = {entry.state for entry in self._entries(request)}
        return self._is_fleet_starting or not states <= {"ready", "draining"}

    def _paroles(self, request: Request, now: float) -> list[float]:
        """Return until when engines are suspected."""
        return [u for e in self._entries(request) if (u := self._loads.suspected_until(e, now)) is not None]

    def _left(self, request: Request) -> float:
        return min(self._until - self._clock.now(), request.deadline)

    def _offered(self, request: Request) -> list[object]:
        now = self._clock.now()
        return [
            (entry.name, entry.address, entry.manager, entry.started, entry.roles)
            for entry in self._entries(request)
            if entry.state == "ready" and self._loads.suspected_until(entry, now) is None
        ]

    async def _wait(self, request: Request, predicate: Callable[[View], bool], seconds: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._view.wait_for(predicate)
        except TimeoutError:
            pass

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Record the body as a wait for an engine, also one that was given up."""
        begin_s = self._clock.now()
        try:
            yield
        finally:
            self._node.note(current_call(), "wait", begin_s)
