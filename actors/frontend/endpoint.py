"""The two generating endpoints: one HTTP request becomes sequences, and their pieces JSON or server-sent events.

Plain ASGI, so that a body is written once for all that is ready, each write waits for the client's socket, and a
client that leaves is noticed at once.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

import msgspec

from .answer import Answer, Backend, Prepared, build_answer, given_id, prepare
from .errors import ApiError, as_api_error
from .failover import Failover
from .generation import Outbox, Sequence, run_sequence
from .http_trace import HttpTrace
from .observed import Observed
from .requests import ChatRequest, CompletionRequest
from .responses import Reply, Shape
from .text import Piece

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

log = logging.getLogger("callboard.frontend")

CONNECTION = "callboard.connection"
"""Where an ASGI scope holds the client's connection (connection.py)."""
_DONE = b"data: [DONE]\n\n"
_LINE_ENDS = {char.encode(): f"\\u{ord(char):04x}".encode() for char in "\x85\u2028\u2029"}
_PATIENCE = 4
"""How many times the size limit a body may have and still be read to its end."""


class ClientLeft(Exception):
    """The client closed its connection: nobody waits for the answer."""


class Endpoint:
    """An ASGI application for one kind of request. ``decode`` checks a body, ``shape`` writes its answer."""

    def __init__(
        self,
        backend: Backend,
        shape: Shape,
        decode: Callable[[bytes], CompletionRequest | ChatRequest],
        name: str,
    ) -> None:
        self._name = name
        """In the metrics."""
        self._backend = backend
        self._shape = shape
        self._decode = decode
        self._encode = msgspec.json.Encoder().encode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        trace = HttpTrace(self._backend.node, self._backend.actor, scope)
        with self._backend.metrics.request(self._name) as observed:
            try:
                await self._answer(scope, receive, trace.watching(observed.watching(send)), observed, trace)
            finally:
                trace.ended(observed.status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, observed: Observed, trace: HttpTrace) -> None:
        if scope["method"] != "POST":
            text = f"Not allowed to {scope['method']} on {scope['path']}."
            return await send_error(send, ApiError(405, text, code="method_not_allowed"), allow=b"POST")
        try:
            body = await read_body(scope, receive, self._backend.max_body_bytes)
            read_s = trace.phase("read")
            request = self._decode(body)
            observed.is_for(request.model)
            prepared = await prepare(request, self._backend)
            trace.prepared(read_s)
        except ClientLeft:
            return None
        except Exception as error:
            return await send_error(send, reported(error))
        prefix = self._shape.id_prefix
        given = self._wanted_id(prepared) or given_id(scope["headers"])
        ids = self._backend.claim_ids(given, prepared.num_sequences, prefix)
        try:
            trace.request_id = ids[0]
            answer = build_answer(prepared, self._backend, ids, prefix, scope["headers"], observed, trace)
            await self._serve(answer, receive, send)
        finally:
            if (connection := scope.get(CONNECTION)) is not None and connection.has_stalled:
                extra = {"request_id": ids[0]}
                log.warning("the request was cancelled: its client took nothing of the answer", extra=extra)
            self._backend.release_ids(ids)

    async def _serve(self, answer: Answer, receive: Receive, send: Send) -> None:
        outbox = self._backend.outboxes[answer.request_id] = Outbox()
        respond = self._stream if answer.prepared.request.stream else self._whole
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(watch_client(receive))
                runs = [
                    group.create_task(run_sequence(s, partial(self._run, answer, s, outbox), outbox, answer.trace))
                    for s in answer.sequences
                ]
                if not await respond(answer, outbox, send):
                    for run in runs:
                        run.cancel()
                watcher.cancel()
        except* ClientLeft:
            pass
        finally:
            del self._backend.outboxes[answer.request_id]

    def _wanted_id(self, prepared: Prepared) -> str | None:
        """Return the request id that the body asks for, None if it asks for none."""
        return None

    async def _run(self, answer: Answer, sequence: Sequence, outbox: Outbox) -> ApiError | None:
        """Bring the tokens of one sequence: from the routers."""
        backend = self._backend
        limits = {"timeout_s": backend.timeout_s, "patience_s": backend.patience_s}
        return await Failover(sequence, backend.node, backend.routers, answer.trace, **limits).run(outbox)

    async def _whole(self, answer: Answer, outbox: Outbox, send: Send) -> bool:
        """Send one JSON body; return whether all sequences ended well."""
        pieces: list[list[Piece]] = [[] for _ in answer.sequences]
        num_open = len(pieces)
        while num_open:
            for item in await outbox.take():
                if isinstance(item.piece, ApiError):
                    await send_error(send, item.piece, answer.request_id)
                    return False
                pieces[item.index].append(item.piece)
                num_open -= item.piece.finish_reason is not None
        answer.trace.has_all_tokens(answer.last_s)
        choices = [self._shape.choice(index, of_choice) for index, of_choice in enumerate(pieces)]
        body = self._encode(answer.reply(self._shape.whole_object, choices, answer.usage()))
        headers = [*answer.headers(b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        return True

    async def _stream(self, answer: Answer, outbox: Outbox, send: Send) -> bool:
        """Send server-sent events; return whether all sequences ended well."""
        has_started, num_open, opened = False, len(answer.sequences), set[int]()
        while num_open:
            events: list[bytes] = []
            failure: ApiError | None = None
            for item in await outbox.take():
                if isinstance(item.piece, ApiError):
                    failure = item.piece
                    break
                self._write(answer, item.index, item.piece, opened, events)
                num_open -= item.piece.finish_reason is not None
            if failure is not None and not has_started:
                await send_error(send, failure, answer.request_id)
                return False
            if not has_started:
                has_started = True
                headers = [*answer.headers(b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            if failure is not None:
                # No [DONE] after an error: the openai client raises on the error, and others see a cut stream.
                answer.observed.failed(failure.status)
                events.append(b"data: " + failure.encode() + b"\n\n")
                await send({"type": "http.response.body", "body": b"".join(events)})
                return False
            if not num_open:
                answer.trace.has_all_tokens(answer.last_s)
                if answer.prepared.request.has_usage_chunk:
                    events.append(self._event(answer.reply(self._shape.chunk_object, [], answer.usage())))
                events.append(_DONE)
            await send({"type": "http.response.body", "body": b"".join(events), "more_body": bool(num_open)})
        return True

    def _write(self, answer: Answer, index: int, piece: Piece, opened: set[int], events: list[bytes]) -> None:
        # Hot: once per token.
        usage = None if answer.prepared.request.has_usage_chunk else msgspec.UNSET
        choices = self._shape.chunks(index, piece)
        if index not in opened:
            opened.add(index)
            if (opening := self._shape.opening(index)) is not None:
                choices.insert(0, opening)
        for choice in choices:
            events.append(self._event(answer.reply(self._shape.chunk_object, [choice], usage)))

    def _event(self, reply: Reply) -> bytes:
        body = self._encode(reply)
        return b"data: " + (body if body.isascii() else in_one_line(body)) + b"\n\n"


def in_one_line(body: bytes) -> bytes:
    """Return the same JSON without what some clients take for the end of a line, such as httpx's ``aiter_lines``."""
    for char, escaped in _LINE_ENDS.items():
        body = body.replace(char, escaped)
    return body


async def send_error(send: Send, error: ApiError, request_id: str | None = None, *, allow: bytes | None = None) -> None:
    """Send an error as a whole answer."""
    body = error.encode()
    headers = [*error.headers(), (b"content-length", str(len(body)).encode())]
    if request_id is not None:
        headers.append((b"x-request-id", request_id.encode()))
    if allow is not None:
        headers.append((b"allow", allow))
    if error.status == 413:
        headers.append((b"connection", b"close"))  # what is left of the body is not worth reading
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def reported(error: Exception) -> ApiError:
    """Return what the client is told of a request that could not be prepared; what is a bug is logged."""
    if not isinstance(error, ApiError):
        log.error("a request could not be prepared", exc_info=error)
    return as_api_error(error)


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Return the whole body. Raises ApiError (413), ClientLeft.

    What is somewhat too large is still read, and dropped: a client that is answered while it sends sees a reset.
    """
    too_large = ApiError(413, f"The request body is larger than {limit} bytes.", code="request_too_large")
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    if announced.isdigit() and int(announced) > _PATIENCE * limit:
        raise too_large
    body, num_bytes = bytearray(), 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise ClientLeft
        data = event.get("body", b"")
        num_bytes += len(data)
        if num_bytes <= limit:
            body += data
        elif num_bytes > _PATIENCE * limit:
            raise too_large
        if not event.get("more_body", False):
            break
    if num_bytes > limit:
        raise too_large
    return bytes(body)


async def watch_client(receive: Receive) -> None:
    """Wait until the client leaves. Raises ClientLeft."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientLeft
