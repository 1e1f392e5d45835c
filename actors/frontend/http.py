"""The HTTP door: Litestar's routes on uvicorn, run inside the actor and on its loop."""

import asyncio
import contextlib
import hashlib
import hmac
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec
import uvicorn
from litestar import Litestar, Request, Response, get
from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler, asgi
from litestar.types import Receive, Scope, Send

from callboard.bus import Node

from . import trace_context
from .acceptor import Acceptor
from .answer import Backend
from .connection import Connection, HttpConfig
from .endpoint import Endpoint
from .errors import ApiError, as_api_error
from .health import health_response
from .listener import BACKLOG
from .requests import decode_chat, decode_completion
from .responses import ChatShape, CompletionShape, ModelReply, ModelsReply
from .shared_port import PortShare

Missing = Callable[[], Sequence[str]]
"""Names the served models that have no ready engine."""

JSON = "application/json"
KEEP_ALIVE_S = 65
"""Longer than clients keep idle connections: whoever closes first must not be the server, or requests are lost."""
LAST_WORDS_S = 2
"""How long a client may take to read the end of an answer that a stop cuts short."""


def build_app(backend: Backend, missing: Missing, api_keys: Sequence[str], more: Sequence[Any] = ()) -> Litestar:
    """Return the application: OpenAI's routes, /health, ``more``, and errors in OpenAI's shape everywhere."""

    @get("/v1/models", sync_to_thread=False)
    def list_models() -> Response[bytes]:
        models = [ModelReply(model.name, model.created, model.max_model_len) for model in backend.models.values()]
        return _json(ModelsReply(models))

    @get("/v1/models/{name:path}", sync_to_thread=False)
    def get_model(request: Request[Any, Any, Any]) -> Response[bytes]:
        model = backend.model(str(request.path_params["name"]).removeprefix("/"))
        return _json(ModelReply(model.name, model.created, model.max_model_len))

    @get("/health", sync_to_thread=False, opt={"is_open": True})
    def health() -> Response[bytes]:
        return health_response(missing())

    completion_endpoint = Endpoint(backend, CompletionShape(), decode_completion, "completions")
    chat_endpoint = Endpoint(backend, ChatShape(), decode_chat, "chat_completions")

    @asgi("/v1/completions", copy_scope=False)
    async def completions(scope: Scope, receive: Receive, send: Send) -> None:
        await completion_endpoint(scope, receive, send)  # type: ignore[arg-type]

    @asgi("/v1/chat/completions", copy_scope=False)
    async def chat_completions(scope: Scope, receive: Receive, send: Send) -> None:
        await chat_endpoint(scope, receive, send)  # type: ignore[arg-type]

    return Litestar(
        route_handlers=[list_models, get_model, health, completions, chat_completions, *more],
        guards=[_guard(api_keys)] if api_keys else [],
        exception_handlers={
            HTTPException: partial(_on_http_error, backend.node),
            ApiError: partial(_on_api_error, backend.node),
            Exception: partial(_on_api_error, backend.node),
        },
        openapi_config=None,
        logging_config=None,
    )


class HttpServer:
    """Uvicorn on a socket that is bound already, as a coroutine that an actor owns.

    With a ``share`` others accept at that socket, too (acceptor.py).
    """

    def __init__(
        self,
        app: Litestar,
        bound: socket.socket,
        *,
        grace_s: int,
        stall_s: float,
        share: PortShare | None = None,
    ) -> None:
        self._config = HttpConfig(
            app,
            stall_s=stall_s,
            loop="none",  # the loop that runs already
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=grace_s + LAST_WORDS_S,
            backlog=BACKLOG,
        )
        self._server = _Uvicorn(self._config)
        self._grace_s = grace_s
        self._socket = bound
        self._share = share
        self._ended = asyncio.Event()

    async def serve(self) -> None:
        """Serve until ``stop`` is called."""
        try:
            if self._share is None:
                await self._server.serve(sockets=[self._socket])
            else:
                async with asyncio.TaskGroup() as group:
                    self._server.acceptor = Acceptor(
                        self._socket,
                        self._share.counts,
                        others=self._share.places,
                        open=self._server.open,
                        spawn=group.create_task,
                    )
                    self._config.on_lost = self._server.acceptor.lost
                    await self._server.serve(sockets=[])
        finally:
            if self._server.acceptor is not None:
                self._server.acceptor.close()
            self._socket.close()
            self._ended.set()

    async def stop(self, cut_short: Callable[[], None]) -> None:
        """Take no new connections, let requests end for the grace period, then call ``cut_short`` to end them."""
        self._server.end()
        try:
            async with asyncio.timeout(self._grace_s):
                await self._ended.wait()
        except TimeoutError:
            cut_short()
            await self._ended.wait()

    @property
    def num_requests(self) -> int:
        """How many are being answered, of all kinds."""
        return len(self._server.server_state.tasks)

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered, or something of an answer waits here for its client to take it."""
        connections = self._server.server_state.connections
        return self.num_requests > 0 or any(each.transport.get_write_buffer_size() for each in connections)

    def close_idle(self) -> None:
        """Close the connections on which nothing is asked."""
        for connection in list(self._server.server_state.connections):
            connection.shutdown()

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """While the body runs take no new connections, and have each that is open end with its next answer."""
        acceptor = self._server.acceptor
        assert acceptor is not None, "others take what comes"
        acceptor.stop()
        self._config.is_leaving = True
        for connection in self._server.server_state.connections:
            assert isinstance(connection, Connection), "HttpConfig says so"
            if connection.cycle is not None and not connection.cycle.response_started:
                connection.cycle.keep_alive = False
        try:
            yield
        finally:
            self._config.is_leaving = False
            if not self._server.should_exit:
                acceptor.start()


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: HttpConfig) -> None:
        super().__init__(config)
        self.acceptor: Acceptor | None = None
        """Of a socket at which others accept, too: Uvicorn has none of its own then."""
        self._exit = asyncio.Event()

    def end(self) -> None:
        self.should_exit = True
        self._exit.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.acceptor is not None:
            self.acceptor.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.acceptor is not None:
            self.acceptor.close()
        await super().shutdown(sockets=sockets)

    async def open(self, accepted: socket.socket) -> None:
        """Serve a connection that was accepted."""
        loop = asyncio.get_running_loop()

        def make() -> asyncio.Protocol:
            return Connection(self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop)

        await loop.connect_accepted_socket(make, accepted)

    async def main_loop(self) -> None:
        """Wake up once a second for the Date header, not ten times to look whether to exit."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._exit.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to the process the actor lives in."""
        yield


def _json(value: msgspec.Struct, *, status: int = 200, headers: dict[str, str] | None = None) -> Response[bytes]:
    return Response(msgspec.json.encode(value), status_code=status, media_type=JSON, headers=headers)


def _guard(api_keys: Sequence[str]) -> Callable[[ASGIConnection[Any, Any, Any, Any], BaseRouteHandler], None]:
    keys = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    def check(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        if handler.opt.get("is_open"):
            return
        scheme, _, key = connection.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        # Every key is compared, each in constant time, and all are equally long: how long it takes says nothing.
        matches = [hmac.compare_digest(given, known) for known in keys]
        if scheme.lower() != "bearer" or not any(matches):
            text = "Incorrect API key provided. Send it as 'Authorization: Bearer KEY'."
            raise ApiError(401, text, code="invalid_api_key")

    return check


def _on_api_error(node: Node, request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    failure = as_api_error(error)
    # What fails before an endpoint sees it has no root span, but its caller's trace all the same.
    context = trace_context.accept(request.scope["headers"], node.rng)
    all_headers = [*failure.headers(), *context.headers(node.new_span())]
    headers = {name.decode(): value.decode() for name, value in all_headers if name != b"content-type"}
    return Response(failure.encode(), status_code=failure.status, media_type=JSON, headers=headers)


def _on_http_error(node: Node, request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        failure = ApiError(404, f"Unknown request URL: {where}.", code="unknown_url")
    elif error.status_code == 405:
        failure = ApiError(405, f"Not allowed to {where.replace(' ', ' on ', 1)}.", code="method_not_allowed")
    else:
        failure = ApiError(error.status_code, error.detail)
    return _on_api_error(node, request, failure)
