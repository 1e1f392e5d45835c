"""The router: runs a script for every request, and gives it what no script should have to write.

That is admission, the deadline, another attempt when an engine dies (recovery.py), the order of tokens (running.py),
the return of everything that was taken (attempt.py), and the record of every sub-request (spans.py).
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec

from callboard.actors.move_protocol import GetLeaving, Leaving
from callboard.actors.protocol import BadRequest, Entry, Generate, GetSubRequests, SubRequests, Token, View
from callboard.actors.registration import DirectoryView, Registration
from callboard.bus import current_call
from callboard.bus.liveness import own_pid
from callboard.bus.watchdog import Hung
from callboard.kv.tokens import TOKEN_BYTES, num_tokens

from .deadline import Deadline
from .errors import ScriptError
from .hanging import HangingScripts
from .in_flight import InFlight
from .known.load_streams import LoadStreams
from .known.loads import Loads
from .leaving import Departures
from .recovery import Recovery
from .script import LOAD_S, Script
from .shared import Shared
from .spans import NUM_REQUESTS, Spans
from .swap.route_changes import RouteChanges
from .swap.routes import Routes

MOST_ID = 256
"""Characters of a request's id: it is kept with each of its sub-requests."""


class RouterActor(RouteChanges):
    """Serves Generate by running a script. Requests keep the script they began with."""

    class Config(msgspec.Struct, frozen=True):
        """``script`` is a path or a shipped name; ``options`` are its keyword arguments."""

        name: str = "main"
        script: str = "least_loaded"
        options: dict[str, Any] = {}
        deadline_s: float = 120.0
        max_queue: int = 256
        patience_s: float = 15.0
        """How long a request waits for an engine that is starting, or for another one after a death."""
        hung_s: float = 0.0
        """How long the code of a script may keep all else from going on, until it is interrupted; 0: for ever."""
        keep: int = NUM_REQUESTS
        """Requests whose sub-requests stay inspectable."""
        routes_at: str = ""
        """The file that holds what was set while it served, for its next start; empty: nothing is kept."""
        is_inner: bool = False
        """It is for scripts of other routers: what is set for all is not set for it."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        config = self.config
        load_s = LOAD_S if config.hung_s else 0.0
        self.routes = Routes(config.name, config.script, config.options, kept_at=config.routes_at, load_s=load_s)
        self.is_inner = config.is_inner
        self.spans = Spans(self.config.keep)
        self.loads = Loads()
        self.view: DirectoryView
        self._shared: Shared
        self._departures: Departures
        self._load_streams: LoadStreams
        self._registration: Registration
        self._started_s = 0.0
        self._in_flight = InFlight(self, self.routes, config.max_queue)
        self._hanging = HangingScripts(self, self.routes, config.hung_s)

    async def start(self) -> None:
        await self.open()
        pid = 0 if self.node.clock.is_virtual else own_pid()[0]
        entry = Entry(self.config.name, "router", self.node.address_of(self.name), detail=self.route_detail(), pid=pid)
        self._registration = Registration(self, entry)
        self.routes.on_change = lambda: self._registration.update(detail=self.route_detail())

    async def open(self) -> None:
        """Begin to serve, as far as the directory does not know of it."""
        self._started_s = self.node.clock.now()
        self.view = DirectoryView(self, on_change=self._on_view)
        self._shared = Shared(self, self.view, self.loads, self.spans)
        self._departures = Departures(self._shared)
        self._load_streams = LoadStreams(self, self.loads, self._shared.events)
        await self.start_routes(self._shared)
        self._hanging.start()

    async def stop(self) -> None:
        self._hanging.stop()

    @property
    def num_in_flight(self) -> int:
        """Requests that have a place."""
        return len(self._in_flight)

    @property
    def script(self) -> Script:
        """The active script."""
        return self.routes.active

    def _on_view(self, view: View) -> None:
        engines = tuple(entry for entry in view.entries if entry.kind == "engine")
        self.loads.report(engines)
        self._shared.know(engines)
        self._shared.events.view(engines)
        self._load_streams.follow(engines)
        self._departures.look()
        self.hear_routers()

    def on_get_leaving(self, message: GetLeaving) -> Leaving:
        return self._departures.tell(message.engine)

    def on_get_sub_requests(self, message: GetSubRequests) -> SubRequests:
        if message.request_id is not None:
            return SubRequests(self.spans.of_request(message.request_id))
        return SubRequests(self.spans.of_last(message.limit))

    async def on_generate(self, message: Generate) -> AsyncIterator[Token]:
        self._in_flight.check()
        begin_s, call = self.node.clock.now(), current_call()
        assert call is not None, "a stream is served"
        _check(message)
        limit_s = min(self.config.deadline_s, call.remaining_s())
        what = f"request {message.request_id}"
        deadline = Deadline(self.node.clock, seconds=limit_s, what=what, on_idle=call.fail)
        admitted = self._in_flight.enter(call, deadline)
        try:
            recovery = Recovery(
                self._shared,
                self.routes,
                message,
                admitted,
                patience_s=self.config.patience_s,
                is_fleet_starting=begin_s - self._started_s < self.config.patience_s,
            )
            async with aclosing(recovery.tokens(begin_s)) as tokens:
                async for token in tokens:
                    if token.finish_reason is not None:
                        self._in_flight.answered(admitted)
                    yield token
        except Hung as hung:  # Where a script's code runs that is not its route, such as that of its options.
            raise ScriptError(
                file=hung.file, line=hung.line, reason=f"{hung}, and was interrupted", remedy=""
            ) from hung
        finally:
            self._in_flight.leave(admitted)
            deadline.close()


def _check(message: Generate) -> None:
    """Raise BadRequest for what is no request, before a script is blamed for it."""
    if len(message.prompt) % TOKEN_BYTES:
        raise BadRequest(reason=f"a prompt of {len(message.prompt)} bytes holds no whole number of int32 ids")
    if not message.prompt:
        raise BadRequest(reason="the prompt is empty")
    if len(message.request_id) > MOST_ID:
        raise BadRequest(reason=f"a request id of {len(message.request_id)} characters is longer than {MOST_ID}")
    if not 0 <= message.num_output_tokens < max(1, num_tokens(message.prompt)):
        raise BadRequest(reason=f"{message.num_output_tokens} tokens cannot be the output in this prompt")
    if message.attempt < 0:
        raise BadRequest(reason="attempts are counted from 0")
