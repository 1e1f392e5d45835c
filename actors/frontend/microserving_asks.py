"""prep_recv and remote_send over HTTP: one ask of an engine's KV manager each, for as long as the client is there."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec

from callboard.actors.protocol import Entry, PrepRecv, RemoteSend
from callboard.bus import BusError, Ref
from callboard.bus.calls import enter_call
from callboard.kv.layout import BadRange, StaleReservation
from callboard.kv.slots import resolve_range
from callboard.kv.tokens import digest_of, num_tokens, pack_tokens

from .answer import REQUEST_ID, prepare
from .endpoint import ClientLeft, Receive, Scope, Send, read_body, reported, send_error, watch_client
from .errors import ApiError, as_api_error
from .http_trace import HttpTrace
from .microserving_door import EngineDoor, EngineRequest
from .microserving_held import Held, NotAName
from .observed import Observed

LONGEST_WAIT_S = 30.0
"""The longest that a manager is asked to wait for free blocks."""


class PrepRecvRequest(EngineRequest, frozen=True, kw_only=True):
    """POST /microserving/prep_recv: ``end`` in tokens of the prompt, negative from its end; one token must be left."""

    end: int


class PrepRecvReply(msgspec.Struct, frozen=True):
    """The reservation's name, and how many tokens need not be sent."""

    kv_append_metadata: str
    prefix_matched_length: int


class RemoteSendRequest(EngineRequest, frozen=True, kw_only=True):
    """POST /microserving/remote_send: compute and send ``[begin, end)``; ``recv_rank`` means nothing here."""

    begin: int
    end: int
    kv_addr_info: str
    recv_rank: int = 0


class RemoteSendReply(msgspec.Struct, frozen=True):
    """It has arrived."""


@dataclass(frozen=True, slots=True)
class EngineCall:
    """A checked call of a verb. ``prompt`` is packed tokens."""

    engine: Entry
    manager: Ref
    user: str
    prompt: bytes

    @property
    def num_tokens(self) -> int:
        """Of the prompt."""
        return num_tokens(self.prompt)


Verb = Callable[[EngineDoor, EngineCall, Any], Awaitable[msgspec.Struct]]


class EngineAsk:
    """An ASGI application for one verb that is answered once. ``name`` is its name in the metrics."""

    def __init__(self, door: EngineDoor, engine: str, name: str, kind: type[EngineRequest], verb: Verb) -> None:
        self._door = door
        self._engine = engine
        self._name = name
        self._kind = kind
        self._verb = verb

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        backend = self._door.backend
        trace = HttpTrace(backend.node, backend.actor, scope)
        with backend.metrics.request(self._name) as observed:
            try:
                await self._answer(scope, receive, trace.watching(observed.watching(send)), observed, trace)
            finally:
                trace.ended(observed.status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, observed: Observed, trace: HttpTrace) -> None:
        door = self._door
        if scope["method"] != "POST":
            text = f"Not allowed to {scope['method']} on {scope['path']}."
            return await send_error(send, ApiError(405, text, code="method_not_allowed"), allow=b"POST")
        try:
            engine = door.engine(self._engine, is_new=self._kind is PrepRecvRequest)
            body = await read_body(scope, receive, door.backend.max_body_bytes)
            read_s = trace.phase("read")
            request = door.decode(self._kind, engine, body)
            observed.is_for(engine.model)
            prepared = await prepare(request, door.backend)
            trace.prepared(read_s)
            if prepared.num_sequences != 1:
                raise ApiError(400, "This takes one prompt, and n = 1.", param="prompt", code="invalid_value")
            if request.user is None or REQUEST_ID.fullmatch(request.user) is None:
                text = "'user' must be the request's id: 1 to 64 letters, digits, '.', '_' and '-'."
                raise ApiError(400, text, param="user", code="invalid_value")
            call = EngineCall(engine, door.manager_of(engine), request.user, pack_tokens(prepared.prompts[0]))
        except ClientLeft:
            return None
        except Exception as error:
            return await send_error(send, reported(error))
        trace.request_id = call.user
        enter_call(trace.root(call.user))
        outcome: msgspec.Struct | ApiError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(watch_client(receive))
                trace.opened()
                outcome = await self._ask(call, request)
                watcher.cancel()
        except* ClientLeft:
            pass
        if isinstance(outcome, ApiError):
            await send_error(send, outcome, call.user)
        elif outcome is not None:
            await send_json(send, outcome, call.user)
        return None

    async def _ask(self, call: EngineCall, request: EngineRequest) -> msgspec.Struct | ApiError:
        try:
            return await self._verb(self._door, call, request)
        except Exception as error:
            return as_api_error(error) if isinstance(error, BusError) else reported(error)


async def send_json(send: Send, reply: msgspec.Struct, request_id: str | None = None) -> None:
    """Send a good answer."""
    body = msgspec.json.encode(reply)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if request_id is not None:
        headers.append((b"x-request-id", request_id.encode()))
    await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def prep_recv(door: EngineDoor, call: EngineCall, request: PrepRecvRequest) -> PrepRecvReply:
    """Reserve at the engine's manager, and hold the reservation for start_generate. Raises BusError, ApiError."""
    _, end = resolve_range(0, request.end, call.num_tokens)
    if end == call.num_tokens:
        reason = "one token must be left to be computed where it is generated"
        raise BadRange(begin=0, end=request.end, num_tokens=call.num_tokens, reason=reason)
    digest, now = digest_of(call.prompt), door.backend.node.clock.now
    before = door.held.of(call.engine.name, call.user)
    is_repeat = before is not None and not before.is_taken and (before.prompt_digest, before.end) == (digest, end)
    if before is not None and not before.is_taken and not is_repeat:
        door.let_go(before)
    attempt = before.attempt if before is not None and is_repeat else door.new_attempt()
    limit_s = door.backend.timeout_s
    message = PrepRecv(call.user, attempt, call.prompt, end, min(LONGEST_WAIT_S, limit_s), call.engine.name)
    reserved = await door.reserve(call.manager, message, limit_s)
    # Its slots may be many, and nobody believes them.
    kv = msgspec.structs.replace(reserved.kv, slots=())
    held = Held(call.engine.name, call.user, digest, end, attempt, kv, now())
    door.hold(held)
    return PrepRecvReply(held.name, min(reserved.begin, end))


async def remote_send(door: EngineDoor, call: EngineCall, request: RemoteSendRequest) -> RemoteSendReply:
    """Have the engine's manager compute and send. Raises BusError, ApiError."""
    begin, end = resolve_range(request.begin, request.end, call.num_tokens)
    try:
        held = door.held.named(request.kv_addr_info)
    except NotAName as error:
        text = f"'kv_addr_info' is not what prep_recv answered: {error}."
        raise ApiError(400, text, param="kv_addr_info", code="invalid_value") from None
    if held is None:
        raise StaleReservation(reservation_id="named in kv_addr_info", reason="it has ended, or never was")
    if held.prompt_digest != digest_of(call.prompt):
        raise ApiError(400, "'kv_addr_info' is of another prompt.", param="kv_addr_info", code="invalid_value")
    begin = max(begin, held.kv.begin)
    if begin >= end:
        return RemoteSendReply()
    if end > held.kv.end:
        reason = f"the reservation ends at {held.kv.end}"
        raise BadRange(begin=begin, end=end, num_tokens=call.num_tokens, reason=reason)
    limit_s = door.backend.timeout_s
    wait_s = min(LONGEST_WAIT_S, limit_s)
    name, now = call.engine.name, door.backend.node.clock.now
    message = RemoteSend(call.user, held.attempt, call.prompt, held.kv, begin, end, name, wait_s)
    try:
        await call.manager.ask(message, timeout=limit_s)
    except asyncio.CancelledError:
        if not held.is_taken:  # Whoever left will not ask for the tokens.
            door.let_go(held)
        raise
    door.held.touch(held, now())
    return RemoteSendReply()
