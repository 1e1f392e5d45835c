"""A mock worker: ``python -m _router.worker PORT KIND`` answers completions as a vLLM server does, computing nothing.

``fastapi`` is built as vLLM's own server is: FastAPI on uvicorn, uvloop and httptools, a generator for each answer.
``raw`` writes ready-made bytes to sockets from an asyncio protocol: the least that a worker in Python can take. Both
have one loop of steps, in which every stream gets one event, as engines have it.
"""

import asyncio
import re
import socket
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import cast

import msgspec
import uvloop

from callboard.actors.parent import die_with_parent

from .events import DONE, MODELS, STEP_S, event, whole

LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n"
EVENTS = {model: (event(model, None), event(model, "length")) for model in MODELS}
WHOLE = {model: {1: whole(model, 1)} for model in MODELS}


class Wanted(msgspec.Struct, frozen=True):
    """What a worker reads of a request."""

    model: str
    max_tokens: int
    stream: bool = False


class Steps:
    """Calls everybody who waits for the next step of a model, once a step."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waiting: list[Callable[[], None]] = []
        self._is_due = False

    def call(self, then: Callable[[], None]) -> None:
        """Have something done in the next step."""
        self._waiting.append(then)
        if not self._is_due:
            self._is_due = True
            loop = asyncio.get_running_loop()
            if self._seconds:
                loop.call_later(self._seconds, self._step)
            else:
                loop.call_soon(self._step)

    def _step(self) -> None:
        waiting, self._waiting, self._is_due = self._waiting, [], False
        for then in waiting:
            then()

    async def next(self) -> None:
        """Wait for the next step."""
        waiter = asyncio.get_running_loop().create_future()
        self.call(partial(_wake, waiter))
        await waiter


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


STEPS = {"free": Steps(0.0), "paced": Steps(STEP_S)}


def answer(wanted: Wanted) -> bytes:
    """Return what is not streamed."""
    known = WHOLE[wanted.model]
    if wanted.max_tokens not in known:
        known[wanted.max_tokens] = whole(wanted.model, wanted.max_tokens)
    return known[wanted.max_tokens]


# ---- raw -----------------------------------------------------------------------------------------------------------


class RawConnection(asyncio.Protocol):
    """A connection of the worker that does the least."""

    decode = staticmethod(msgspec.json.Decoder(Wanted).decode)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name.
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        found = LENGTH.search(head)
        length = int(found[1]) if found else 0
        if not end or len(body) < length:
            return
        self._received = body[length:]
        if head.startswith(b"GET "):
            self._send(b"application/json", b'{"object": "list", "data": []}')
            return
        wanted = self.decode(body[:length])
        steps = STEPS[wanted.model]
        if not wanted.stream:
            steps.call(lambda: self._send(b"application/json", answer(wanted)))
            return
        pieces = tuple(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in EVENTS[wanted.model])
        left = wanted.max_tokens

        def step() -> None:
            nonlocal left
            left -= 1
            piece = pieces[left == 0]
            if left == wanted.max_tokens - 1:
                piece = HEAD % b"text/event-stream" + b"Transfer-Encoding: chunked\r\n\r\n" + piece
            if left:
                steps.call(step)
            else:
                piece += b"%x\r\n%b\r\n0\r\n\r\n" % (len(DONE), DONE)
            self._transport.write(piece)

        steps.call(step)

    def _send(self, kind: bytes, body: bytes) -> None:
        self._transport.write(HEAD % kind + b"Content-Length: %d\r\n\r\n" % len(body) + body)


async def serve_raw(listening: socket.socket) -> None:
    """Serve until the process ends."""
    server = await asyncio.get_running_loop().create_server(RawConnection, sock=listening)
    await server.serve_forever()


# ---- as vLLM's server is -------------------------------------------------------------------------------------------


async def serve_fastapi(listening: socket.socket) -> None:
    """Serve until the process ends."""
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import Response, StreamingResponse

    app = FastAPI()

    async def events(wanted: Wanted) -> AsyncIterator[bytes]:
        steps, (piece, last) = STEPS[wanted.model], EVENTS[wanted.model]
        for left in range(wanted.max_tokens - 1, -1, -1):
            await steps.next()
            yield piece if left else last
        yield DONE

    async def health() -> dict[str, list[str]]:
        return {"data": []}

    async def complete(request: Request) -> Response:
        wanted = msgspec.json.decode(await request.body(), type=Wanted)
        if wanted.stream:
            return StreamingResponse(events(wanted), media_type="text/event-stream")
        await STEPS[wanted.model].next()
        return Response(answer(wanted), media_type="application/json")

    app.get("/health")(health)
    app.get("/v1/models")(health)
    app.post("/v1/completions")(complete)
    await uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).serve([listening])


def main() -> None:
    die_with_parent()
    listening = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024)
    listening.setblocking(False)
    uvloop.run({"raw": serve_raw, "fastapi": serve_fastapi}[sys.argv[2]](listening))


if __name__ == "__main__":
    main()
