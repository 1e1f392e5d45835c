"""One run of a script for one request: what it has taken from the fleet, and how all of it comes back.

A script may be cancelled at any await, forget a scope, or die. Whatever it took (reservations, streams, its place
in the load counts) is noted here when it is taken and given back when the attempt closes.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from callboard.actors.protocol import Entry, KvAddr, Release, SubRequest
from callboard.bus import ActorDied, BusError, Call, LinkLost, Ref, UnknownActor, current_call
from callboard.kv.layout import CorruptPages, StaleReservation

from .request import Request
from .shared import Shared

GONE = (ActorDied, LinkLost, UnknownActor)
"""The far side is dead or out of reach, or its process lives on without it: another engine may do better."""
RETRIED = (*GONE, StaleReservation, CorruptPages)
"""What ends an attempt, and may not happen to the next: also where a KV manager was restarted, or pages came broken."""
MOST_ERROR = 1000
"""Characters kept of what an actor said: the records of many requests are kept, and sent as one message."""
RELEASE_S = 2.0
"""Limit of a release: the lease on the reservation ends it anyway."""


class Span:
    """One call of a verb while it runs. ``facts`` are fields of SubRequest; recorded once."""

    def __init__(self, request_id: str, verb: str, actor: str, start_s: float) -> None:
        self.request_id = request_id
        self.verb = verb
        self.actor = actor
        self.start_s = start_s
        self.error = ""
        self.facts: dict[str, Any] = {}
        self.is_recorded = False


class Attempt:
    """What one run of a script holds. ``close`` gives back all of it; afterwards no verb can be called."""

    def __init__(self, shared: Shared, request: Request, begin_s: float) -> None:
        self.shared = shared
        self.node = shared.node
        self.request = request
        self.loads = shared.loads
        self.num_seen_tokens = request.num_tokens
        """Of the prompt's first tokens, how many this router was asked for before: engines may have them."""
        self.cached: dict[str, int] = {}
        """Tokens of the prompt that engines have, as far as the script has asked."""
        self.num_computed_tokens = 0
        """Prompt tokens that were computed on engines that sent them on."""
        self.generations = shared.generations
        self.is_moved = False
        """A hand-over of its was begun."""
        self._router = shared.router
        self._spans = shared.spans
        self._is_closed = False
        self._picked: dict[str, int] = {}
        self._reservations: dict[tuple[str, str], KvAddr] = {}
        self._open: dict[Callable[[], Awaitable[None]], None] = {}
        self._call = current_call()
        self._begin_s = self._script_s = begin_s
        self._num_verbs = 0
        self._verb_s = begin_s
        self._heard_s = 0.0
        """When the latest end had been heard, as the last verb ended."""
        self._is_scripting = False
        """The verbs under way are the first after what the script did by itself: that is still to be recorded."""

    @property
    def call_served(self) -> Call | None:
        """The request's stream, as its client asked for it."""
        return self._call

    @property
    def is_closed(self) -> bool:
        """Whether no verb can be called any more."""
        return self._is_closed

    def alone_s(self) -> float:
        """Return for how long the script has waited for nothing of the fleet, in seconds."""
        return 0.0 if self._num_verbs else self.node.clock.now() - self._script_s

    # ---- places in the load counts

    def pick(self, engine: str) -> None:
        """Count the request as the engine's from now on. A repeat does nothing."""
        if self._is_closed:
            raise RuntimeError(f"request {self.request.id} has ended, its script may ask for nothing more")
        if engine not in self._picked:
            self._picked[engine] = 0
            self.loads.take(engine, self.request.id)

    def unpick(self, engine: str) -> None:
        """Take a pick back, unless a verb runs there."""
        if self._picked.get(engine) == 0:
            del self._picked[engine]
            self.loads.give_back(engine, self.request.id)

    def promise(self, engine: str, begin: int, end: int, *, is_decode: bool = False) -> None:
        """Say what the request will bring to an engine that it has picked: a range to compute, and then to decode."""
        begin = max(begin, self.cached.get(engine, 0))
        self.loads.promise(engine, self.request.id, num_tokens=end - begin, is_decode=is_decode)

    # ---- calls of verbs

    def manager_of(self, entry: Entry) -> Ref:
        """Return the KV manager of an engine. Raises UnknownActor."""
        if entry.manager is None:
            raise UnknownActor(actor=f"KV manager of {entry.name}", node=entry.address.node)
        return self.node.ref(entry.manager)

    @contextmanager
    def call(self, verb: str, entry: Entry, *, keeps_place: bool = False) -> Iterator[Span]:
        """Record a call and its failure; with ``keeps_place`` the engine keeps the request afterwards."""
        self.pick(entry.name)
        self._picked[entry.name] += 1
        self._verb_begins()
        span = Span(self.request.id, verb, entry.name, self.node.clock.now())
        try:
            yield span
        except (asyncio.CancelledError, GeneratorExit):
            span.error = "cancelled"
            raise
        except Exception as error:
            span.error = f"{type(error).__name__}: {error}"[:MOST_ERROR]
            if isinstance(error, GONE):
                self.loads.suspect(entry, self.node.clock.now())
            raise
        finally:
            self.record(span)
            if entry.name in self._picked:
                self._picked[entry.name] -= 1
                if not keeps_place:
                    self.unpick(entry.name)

    def record(self, span: Span) -> None:
        """Keep a call as over now. A repeat does nothing."""
        if not span.is_recorded:
            span.is_recorded = True
            end_s = self.node.clock.now()
            self._note_script()
            self._num_verbs -= 1
            before_s, self._heard_s = self._heard_s, 0.0 if self._call is None else self._call.heard_s
            if not self._num_verbs:
                # What was heard of the verb itself, not of one beside it that ended earlier.
                self._script_s = self._heard_s if self._heard_s > max(span.start_s, before_s) else end_s
            self._spans.add(
                SubRequest(span.request_id, span.verb, span.actor, span.start_s, end_s, error=span.error, **span.facts)
            )

    def _verb_begins(self) -> None:
        """From here on the script waits for the fleet."""
        if not self._num_verbs:
            self._is_scripting, self._verb_s = True, self.node.clock.now()
            self.node.begin_turn(self._call)
        else:
            self._note_script()
        self._num_verbs += 1

    def _note_script(self) -> None:
        """Record the script's own time until the first of the verbs under way was sent."""
        if self._is_scripting:
            self._is_scripting = False
            sent_s = 0.0 if self._call is None else self._call.sent_s
            self.node.note(self._call, "script", self._script_s, end=max(sent_s, self._verb_s))

    def note_turn(self, begin_s: float) -> None:
        """Record that a verb goes on only now, if the router's process was at other things for long."""
        self.node.note_turn(self._call, begin_s)

    def note_end(self, **facts: Any) -> None:
        """Record that the script has run, with what it was and what it chose."""
        if not self._num_verbs:
            self.node.note(self._call, "script", self._script_s)
        self.node.note(self._call, "attempt", self._begin_s, **facts)

    # ---- reservations

    def took(self, addr: KvAddr) -> None:
        """Note a reservation that must come back: at once if the attempt is over, and only a task was left behind."""
        if self._is_closed:
            self.spawn_detached(self.send_release(addr))
        else:
            self._reservations[_key(addr)] = addr

    def adopted(self, addr: KvAddr) -> None:
        """Note that an engine has the reservation's blocks now: there is nothing left to release."""
        self._reservations.pop(_key(addr), None)

    async def release(self, addr: KvAddr) -> None:
        """Give a reservation back if nobody adopted it. Goes on when the caller is cancelled; never raises BusError."""
        if self._reservations.pop(_key(addr), None) is not None:
            await asyncio.shield(self.spawn_detached(self.send_release(addr)))

    def release_later(self, addr: KvAddr) -> None:
        """Give a reservation back if nobody adopted it, without waiting for it."""
        if self._reservations.pop(_key(addr), None) is not None:
            self.spawn_detached(self.send_release(addr))

    async def send_release(self, addr: KvAddr) -> None:
        """Ask a manager to take its reservation back."""
        try:
            await self.node.ref(addr.manager).ask(Release(addr), timeout=RELEASE_S)
        except BusError:
            pass  # Gone with its manager, or its lease will end it.

    def spawn_detached(self, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run a coroutine as the router's task, outside of the request's deadline and cancellation."""
        return contextvars.Context().run(self._router.spawn, coroutine)

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run a coroutine as the router's task, under the request's deadline."""
        return self._router.spawn(coroutine)

    # ---- the end

    def opened(self, close: Callable[[], Awaitable[None]]) -> None:
        """Note something to be closed with the attempt."""
        self._open[close] = None

    def closed(self, close: Callable[[], Awaitable[None]]) -> None:
        """Forget what was closed."""
        self._open.pop(close, None)

    async def close(self) -> None:
        """End every stream, then release every reservation. A repeat does nothing."""
        self._is_closed = True
        try:
            for close in list(self._open):
                await close()
            self._open.clear()
        finally:
            releases = [self.spawn_detached(self.send_release(addr)) for addr in self._reservations.values()]
            self._reservations.clear()
            for engine in self._picked:
                self.loads.give_back(engine, self.request.id)
            self._picked.clear()
        for release in releases:
            await asyncio.shield(release)


def _key(addr: KvAddr) -> tuple[str, str]:
    return addr.epoch, addr.reservation_id
