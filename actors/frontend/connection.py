"""A client's connection: whoever neither sends the rest of a request nor takes anything of its answer is cut off.

Uvicorn's protocol has no such limits: a client that does not read would keep its request, its place at the router and
its engine's blocks for as long as it likes.
"""

import asyncio
import fcntl
import logging
import struct
import termios
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .endpoint import CONNECTION

log = logging.getLogger("callboard.frontend")

REQUEST_S = 60.0
"""How long the head of a request may take, and each next piece of its body."""
NUM_LOOKS = 4
"""How often in ``stall_s`` it is looked whether the client has taken anything."""


class HttpConfig(uvicorn.Config):
    """Uvicorn's settings and ours. ``stall_s``: how long a client may take nothing of what is written to it."""

    def __init__(self, app: Any, *, stall_s: float, **settings: Any) -> None:
        super().__init__(app, http=Connection, **settings)
        self.stall_s = stall_s
        self.is_leaving = False
        """Whether every answer is the last one of its connection."""
        self.on_lost: Callable[[], None] = lambda: None
        """Called for every connection that has ended."""


class Connection(HttpToolsProtocol):
    """One client's connection. ``has_stalled``: it was cut off because its client took nothing for ``stall_s``."""

    config: HttpConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.has_stalled = False
        self._request_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._num_untaken = 0
        """Bytes that the client had not taken when the timer last looked."""
        self._num_looks = 0
        """In a row that found as many."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_more()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_request_timer()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        super().connection_lost(exc)
        self.config.on_lost()

    # ---- what the client sends -----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[literal-required]
        self._expect_more()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.config.is_leaving and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._expect_more()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._cancel_request_timer()

    def _cancel_request_timer(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _expect_more(self) -> None:
        self._cancel_request_timer()
        self._request_timer = self.loop.call_later(REQUEST_S, self._request_is_late)

    def _request_is_late(self) -> None:
        if self.pipeline or self.flow.read_paused:  # It is this side that does not read.
            self._expect_more()
        else:
            self.transport.abort()

    # ---- what the client reads -----------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()  # Closing would wait for ever for what is not read.

    def _watch(self) -> None:
        num_untaken = self._count_untaken()
        if num_untaken != self._num_untaken:
            self._num_untaken, self._num_looks = num_untaken, 0
        if num_untaken and self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.config.stall_s / NUM_LOOKS, self._look)

    def _look(self) -> None:
        self._stall_timer = None
        self._num_looks += 1
        self._watch()
        if self._num_untaken and self._num_looks >= NUM_LOOKS:
            self.has_stalled = True
            log.warning("client %s took nothing of its answer for %.3g s: cut off", self.client, self.config.stall_s)
            self.transport.abort()  # Closing would wait for the client to read what is left.

    def _count_untaken(self) -> int:
        """Return how many bytes wait here; with what the kernel holds, for it takes from us in large pieces only."""
        num_bytes = self.transport.get_write_buffer_size()
        connected = self.transport.get_extra_info("socket")
        if not num_bytes or connected is None or connected.fileno() < 0:
            return num_bytes
        in_kernel: int = struct.unpack("i", fcntl.ioctl(connected.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
        return num_bytes + in_kernel
