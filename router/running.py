"""One run of a script for one request: its tokens in order, what its failures mean, and the record of it."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

from callboard.actors.protocol import Token
from callboard.bus import BusError
from callboard.bus.errors import words_of
from callboard.bus.watchdog import Hung
from callboard.kv.layout import BadRange

from .attempt import MOST_ERROR, Attempt
from .errors import NoEngine, ScriptError
from .fault import fault_in
from .fleet import Fleet
from .in_flight import Admitted
from .patience import Patience
from .request import Request
from .script import Script
from .script_trace import first_cause, in_one_line, is_being_cancelled, line_in, trace_of
from .shared import Shared
from .swap.routes import Routes
from .watching import Watching

log = logging.getLogger("callboard.router")

CLOSE_S = 5.0
"""How long a script may take to leave its scopes."""
MOST_NOTE = 200
"""Characters of a note that a record keeps."""
EMPTY = (LookupError, ZeroDivisionError, ValueError)
"""What choosing from no engines at all raises in a script that did not check."""
_END: Any = object()


async def run_script(
    shared: Shared,
    routes: Routes,
    script: Script,
    request: Request,
    admitted: Admitted,
    patience: Patience,
    begin_s: float,
) -> AsyncGenerator[Token, None]:
    """Run the script once; yield its tokens in order, from position ``request.num_output_tokens``.

    All it took is given back when this ends, or once it is given up (in_flight.py).
    """
    watch = routes.begins(script, shared, request)
    attempt = Attempt(shared if watch is None else watch.shared, request, begin_s)
    if not request.num_output_tokens:  # What goes on elsewhere was asked for once.
        attempt.num_seen_tokens = shared.prefixes.note(request.model, request.packed_prompt, begin_s)
    error_words, failure = "", None
    fleet = Fleet(attempt, shared.view)
    deadline, call = admitted.deadline, admitted.call
    first = position = request.num_output_tokens
    is_finished = False
    route: Any = None
    try:
        await patience.waits_for_first_view(request)
        route = script.route(request, fleet)
        admitted.runs(script, request, attempt, route)
        while True:
            # Hot: once per token (bench/serve.py).
            with deadline:
                token = await anext(route, _END)
            if call.ended:  # It has swallowed its cancellation: nobody is told anything any more.
                raise asyncio.CancelledError
            if token is _END:
                break
            _check_token(script, route, token, position, is_finished)
            is_finished = token.finish_reason is not None
            if is_finished:
                shared.lengths.ended(request.model, position + 1)
            position += 1
            yield token
        if not is_finished:
            num_tokens = position - first
            what = f"ended after {num_tokens} tokens, none of which was the last" if num_tokens else "yielded nothing"
            raise _broke_rule(script, route, f"route {what}", "Yield every token of start_generate, to its end")
    except (Exception, SystemExit, asyncio.CancelledError, Hung, BaseExceptionGroup) as error:
        # A script's exit() ends its request, not the fleet; and what it waits for may be cancelled without the request.
        if isinstance(error, asyncio.CancelledError) and is_being_cancelled():
            raise
        verdict = _verdict(script, fleet, request, error)
        error_words = words_of(verdict)[:MOST_ERROR]
        failure = fault_in(verdict, error, attempt, script, patience)
        if verdict is error:
            raise
        raise verdict from error
    finally:
        if watch is not None:
            watch.is_finished, watch.is_moved = is_finished, attempt.is_moved
        try:
            await _close(script, route, attempt, watch)
        finally:
            if admitted.ends_run():
                routes.ended(script, request, failure, is_finished=is_finished)
            attempt.note_end(
                error=error_words or ("" if is_finished else "cancelled"),
                script=script.name,
                version=script.version,
                number=request.attempt,
                options=script.shown_options,
                **{f"why.{name}": value[:MOST_NOTE] for name, value in request.notes.items()},
            )


def _verdict(script: Script, fleet: Fleet, request: Request, error: BaseException) -> Exception:
    """Return what a failure of the script is to its client."""
    cause = first_cause(error)
    if isinstance(cause, NoEngine):
        return cause
    if isinstance(cause, BusError) and not isinstance(cause, ScriptError | BadRange):
        return cause
    if fleet.lacking is not None and isinstance(cause, EMPTY):
        return fleet.no_engine(fleet.lacking)
    trace = trace_of(script.path, script.source, error)
    log.error("script %s failed: %s", script.name, in_one_line(trace), exc_info=error, extra={"request_id": request.id})
    if isinstance(cause, ScriptError):
        return cause
    if isinstance(cause, BadRange):
        reason = str(cause)
    elif isinstance(cause, Hung):
        cause.is_told = True
        reason = f"{cause}, and was interrupted"
        remedy = "Await what takes long"
        return ScriptError(file=script.path, line=cause.line, reason=reason, remedy=remedy)
    elif isinstance(cause, asyncio.CancelledError):
        reason = "route waited for a task that was cancelled"
    else:
        reason = f"route raised {type(cause).__name__}: {cause}"
    return ScriptError(file=script.path, line=line_in(script.path, cause), reason=reason, remedy="")


async def _close(script: Script, route: Any, attempt: Attempt, watch: Watching | None) -> None:
    try:
        if route is not None:
            async with asyncio.timeout(CLOSE_S):
                await route.aclose()
    except (Exception, Hung, BaseExceptionGroup) as error:
        is_in_order = isinstance(error, BaseExceptionGroup) and error.split(GeneratorExit)[1] is None
        if not is_in_order:  # A TaskGroup says so that it was closed.
            log.error("script %s failed while it was closed", script.path, exc_info=error)
    finally:
        if watch is not None:
            watch.end()
        await attempt.close()


def _check_token(script: Script, route: Any, token: object, position: int, is_finished: bool) -> None:
    remedy = "Yield the tokens of one start_generate as they come"
    if not isinstance(token, Token):
        raise _broke_rule(script, route, f"route yielded a {type(token).__name__} and not a Token", remedy)
    if is_finished:
        raise _broke_rule(script, route, "route yielded a token after the last one", remedy)
    if token.position != position:
        raise _broke_rule(script, route, f"route yielded position {token.position} where {position} was due", remedy)


def _broke_rule(script: Script, route: Any, reason: str, remedy: str) -> ScriptError:
    # Of the yield where it stands, or of its first line where it has ended.
    frame = getattr(route, "ag_frame", None)
    line = route.ag_code.co_firstlineno if frame is None else frame.f_lineno
    return ScriptError(file=script.path, line=line, reason=reason, remedy=remedy)
