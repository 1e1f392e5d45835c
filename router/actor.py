"""The router: runs a script for every request, and gives it what no script should have to write.

That is admission, the deadline, another attempt when an engine dies before the first token, the order of tokens,
the return of everything that was taken, and the record of every sub-request.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import msgspec

from callboard.actors.actor import Actor
from callboard.actors.protocol import BadRequest, Entry, Generate, GetSubRequests, SubRequests, Token, View
from callboard.actors.registration import DirectoryView, Registration
from callboard.bus import BusError, current_call
from callboard.bus.errors import words_of
from callboard.bus.liveness import own_pid
from callboard.kv.layout import BadRange
from callboard.kv.tokens import TOKEN_BYTES

from .attempt import MOST_ERROR, RETRIED, Attempt
from .deadline import Deadline
from .errors import NoEngine, QueueFull, ScriptError
from .fleet import Fleet
from .loads import Loads
from .patience import Patience
from .request import Request
from .script import Script, line_in, load_script
from .spans import NUM_REQUESTS, Spans

log = logging.getLogger("callboard.router")

NUM_ATTEMPTS = 3
MOST_ID = 256
"""Characters of a request's id: it is kept with each of its sub-requests."""
CLOSE_S = 5.0
"""How long a script may take to leave its scopes."""
MOST_NOTE = 200
"""Characters of a note that a record keeps."""
EMPTY = (LookupError, ZeroDivisionError, ValueError)
"""What choosing from no engines at all raises in a script that did not check."""
_END: Any = object()


class RouterActor(Actor):
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
        keep: int = NUM_REQUESTS
        """Requests whose sub-requests stay inspectable."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self.script = load_script(self.config.script, self.config.options)
        self.num_in_flight = 0
        self.spans = Spans(self.config.keep)
        self.loads = Loads()
        self.view: DirectoryView
        self._registration: Registration
        self._started_s = 0.0

    async def start(self) -> None:
        self._started_s = self.node.clock.now()
        self.view = DirectoryView(self, on_change=self._on_view)
        detail = {"script": self.script.name, "version": self.script.version, "path": self.script.path}
        pid = 0 if self.node.clock.is_virtual else own_pid()[0]
        entry = Entry(self.config.name, "router", self.node.address_of(self.name), detail=detail, pid=pid)
        self._registration = Registration(self, entry)

    def _on_view(self, view: View) -> None:
        self.loads.report(tuple(entry for entry in view.entries if entry.kind == "engine"))

    def on_get_sub_requests(self, message: GetSubRequests) -> SubRequests:
        if message.request_id is not None:
            return SubRequests(self.spans.of_request(message.request_id))
        return SubRequests(self.spans.of_last(message.limit))

    async def on_generate(self, message: Generate) -> AsyncIterator[Token]:
        if self.num_in_flight >= self.config.max_queue:
            raise QueueFull(num_in_flight=self.num_in_flight, max_queue=self.config.max_queue)
        begin_s, call = self.node.clock.now(), current_call()
        assert call is not None, "a stream is served"
        _check(message)
        limit_s = min(self.config.deadline_s, call.remaining_s())
        what = f"request {message.request_id}"
        deadline = Deadline(self.node.clock, seconds=limit_s, what=what, on_idle=call.fail)
        self.num_in_flight += 1
        try:
            async with aclosing(self._attempts(message, deadline, begin_s)) as tokens:
                async for token in tokens:
                    yield token
        finally:
            self.num_in_flight -= 1
            deadline.close()

    async def _attempts(self, message: Generate, deadline: Deadline, begin_s: float) -> AsyncGenerator[Token, None]:
        """Run the script until it succeeds, fails for good, or has sent a token."""
        script, clock = self.script, self.node.clock
        is_starting = clock.now() - self._started_s < self.config.patience_s
        patience = Patience(
            self.view, self.loads, clock, patience_s=self.config.patience_s, is_fleet_starting=is_starting
        )
        number = 0
        while True:
            request = Request(message, attempt=number, remaining_s=deadline.remaining_s)
            has_sent = False
            try:
                async with aclosing(self._run(script, request, deadline, patience, begin_s)) as tokens:
                    async for token in tokens:
                        has_sent = True
                        yield token
                return
            except NoEngine:
                if has_sent:
                    raise
                with self._waiting():
                    is_hopeful = await patience.waits_for_engine(request, is_retry=number > 0)
                if not is_hopeful:
                    raise
            except RETRIED as error:
                number += 1
                if has_sent or number >= NUM_ATTEMPTS:
                    raise
                log.warning("attempt %d follows after %r", number + 1, error, extra={"request_id": request.id})
            begin_s = clock.now()

    async def _run(
        self, script: Script, request: Request, deadline: Deadline, patience: Patience, begin_s: float
    ) -> AsyncGenerator[Token, None]:
        """Run the script once; yield its tokens in order. All it took is given back when this ends."""
        attempt = Attempt(self, request, self.loads, self.spans, begin_s)
        error_words = ""
        fleet = Fleet(attempt, self.view)
        position, is_finished = 0, False
        route: Any = None
        try:
            if not self.view.has_view:
                with self._waiting():
                    await patience.waits_for_first_view(request)
            route = script.route(request, fleet)
            while True:
                # Hot: once per token (bench/serve.py).
                with deadline:
                    token = await anext(route, _END)
                if token is _END:
                    break
                _check_token(script, token, position, is_finished)
                is_finished = token.finish_reason is not None
                position += 1
                yield token
            if not is_finished:
                what = f"ended after {position} tokens, none of which was the last" if position else "yielded nothing"
                raise _broke_rule(script, f"route {what}", "Yield every token of start_generate, to its end")
        except (Exception, SystemExit) as error:  # A script's exit() ends its request, not the fleet.
            verdict = self._verdict(script, fleet, request, error)
            error_words = words_of(verdict)[:MOST_ERROR]
            if verdict is error:
                raise
            raise verdict from error
        finally:
            try:
                await self._close(script, route, attempt)
            finally:
                attempt.note_end(
                    error=error_words or ("" if is_finished else "cancelled"),
                    script=script.name,
                    version=script.version,
                    number=request.attempt,
                    options=script.shown_options,
                    **{f"why.{name}": value[:MOST_NOTE] for name, value in request.notes.items()},
                )

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Record the body as a wait for an engine, also one that was given up."""
        begin_s = self.node.clock.now()
        try:
            yield
        finally:
            self.node.note(current_call(), "wait", begin_s)

    def _verdict(self, script: Script, fleet: Fleet, request: Request, error: Exception | SystemExit) -> Exception:
        """Return what a failure of the script is to its client."""
        cause = _first_cause(error)
        if isinstance(cause, NoEngine):
            return cause
        if isinstance(cause, BusError) and not isinstance(cause, ScriptError | BadRange):
            return cause
        if fleet.lacking is not None and isinstance(cause, EMPTY):
            return fleet.no_engine(fleet.lacking)
        log.error("script %s failed", script.path, exc_info=error, extra={"request_id": request.id})
        if isinstance(cause, ScriptError):
            return cause
        reason = str(cause) if isinstance(cause, BadRange) else f"route raised {type(cause).__name__}: {cause}"
        return ScriptError(file=script.path, line=line_in(script.path, cause), reason=reason, remedy="")

    async def _close(self, script: Script, route: Any, attempt: Attempt) -> None:
        try:
            if route is not None:
                async with asyncio.timeout(CLOSE_S):
                    await route.aclose()
        except Exception as error:
            log.error("script %s failed while it was closed", script.path, exc_info=error)
        finally:
            await attempt.close()


def _check(message: Generate) -> None:
    """Raise BadRequest for what is no request, before a script is blamed for it."""
    if len(message.prompt) % TOKEN_BYTES:
        raise BadRequest(reason=f"a prompt of {len(message.prompt)} bytes holds no whole number of int32 ids")
    if len(message.request_id) > MOST_ID:
        raise BadRequest(reason=f"a request id of {len(message.request_id)} characters is longer than {MOST_ID}")


def _check_token(script: Script, token: object, position: int, is_finished: bool) -> None:
    remedy = "Yield the tokens of one start_generate as they come"
    if not isinstance(token, Token):
        raise _broke_rule(script, f"route yielded a {type(token).__name__} and not a Token", remedy)
    if is_finished:
        raise _broke_rule(script, "route yielded a token after the last one", remedy)
    if token.position != position:
        raise _broke_rule(script, f"route yielded position {token.position} where {position} was due", remedy)


def _broke_rule(script: Script, reason: str, remedy: str) -> ScriptError:
    return ScriptError(file=script.path, line=None, reason=reason, remedy=remedy)


def _first_cause(error: Exception | SystemExit) -> Exception | SystemExit:
    """Return the error that counts: of several raised together, the first from the bus."""
    if not isinstance(error, ExceptionGroup):
        return error
    causes = [_first_cause(inner) for inner in error.exceptions]
    return next((cause for cause in causes if isinstance(cause, BusError)), causes[0])
