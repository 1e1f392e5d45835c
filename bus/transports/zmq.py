"""ZeroMQ on the event loop's file descriptors: one bound ROUTER, one DEALER per peer dialled.

Not ``zmq.asyncio``: beside this it had 1.7 times the latency and a fifth of the requests/s. The descriptor of a
ZeroMQ socket is edge-triggered, so it is drained until EAGAIN, a bounded number of messages per loop pass, and its
events are looked at again after every send. ZeroMQ never reconnects (RECONNECT_IVL=-1): after a silent reconnection
messages meant for a dead process would reach its successor.
"""

import asyncio
import functools
import operator
import socket as sockets
from contextvars import copy_context
from typing import Any

import zmq
from zmq.backend import Socket
from zmq.utils.monitor import recv_monitor_message

from callboard.bus.frames import MAX_BATCH_BYTES, MAX_FRAME_BYTES

from .contract import Connection, Listener
from .curve import check_dialling, check_listening

DRAIN_PER_PASS = 256
"""Messages taken from one socket in one loop pass, before others get their turn."""
HIGH_WATER_MARK = 128
"""Batches on their way to or from one peer, in each of ZeroMQ's two queues: 8 MiB of full ones."""
NOBLOCK, NOBLOCK_SNDMORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
EVENTS, POLLIN, POLLOUT = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.POLLOUT)
"""Plain numbers: an operation on Python's flags costs as much as one on the socket."""
LINGER_MS = 500
HANDSHAKE_S = 15.0
"""How long a handshake may take. With keys the accepting node's loop has a part in it, and may be busy."""
KEY_REFUSED = "the key was refused"

REASONS = {
    zmq.EVENT_DISCONNECTED: "disconnected",
    zmq.EVENT_CLOSED: "nobody listens",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed (does it take the fleet's keys?)",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "the handshake failed (does it take the fleet's keys?)",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: KEY_REFUSED,
}
"""Monitor events that end a dialled connection, in words."""


class Reader:
    """Drains one ZeroMQ socket on its descriptor."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self.socket = socket
        self.loop = asyncio.get_running_loop()
        self._context = copy_context()
        """That of its start: what comes must not be taken in the call that has just sent something."""
        self.is_open = True
        self._is_scheduled = False
        self._must_look = False
        self._is_draining = False
        # The methods of the class below: zmq.Socket's own send is Python, and finding its attributes is slow.
        self._get: Any = Socket.get.__get__(socket)
        self._recv: Any = Socket.recv.__get__(socket)
        self._send: Any = Socket.send.__get__(socket)
        self._fd = int(socket.getsockopt(zmq.FD))
        self.loop.add_reader(self._fd, self._ready)
        self.schedule()

    def schedule(self) -> None:
        """Look whether there is something to take, once what is under way in this loop pass is done."""
        self._must_look = True
        if not self._is_scheduled and self.is_open:
            self._is_scheduled = True
            self.loop.call_soon(self._look, context=self._context)

    def _look(self) -> None:
        self._is_scheduled = False
        # A send in between has looked already.
        if self._must_look and self.is_open and self._get(EVENTS) & POLLIN:
            self._drain(DRAIN_PER_PASS)

    def _ready(self) -> None:
        # Hot: once per batch taken when little is going on (bench/bus.py). What the first message sets going, such as
        # the next request, goes before the question whether there is a second.
        if self.is_open:
            self._drain(1)

    def _drain(self, limit: int) -> None:
        # To ask for events costs half of what a recv does that finds nothing.
        self._is_draining = True
        try:
            for left in range(limit, 0, -1):
                self.take()
                if self.is_closed() or (left > 1 and not self._get(EVENTS) & POLLIN):
                    return
        except zmq.Again:
            return
        except BaseException:
            self.schedule()  # The descriptor tells of what is left only once.
            raise
        finally:
            self._is_draining = False
        self.schedule()

    def is_closed(self) -> bool:
        """Return whether the socket is closed; taking a message may close it."""
        return not self.is_open

    def take(self) -> None:
        """Receive one message and deliver it. Raises zmq.Again when there is none."""
        raise zmq.Again

    def events(self) -> int:
        """Return what the socket is ready for; asking also lets ZeroMQ process its own commands."""
        events: int = self._get(EVENTS)
        return events

    def after_send(self) -> int:
        """Return the events after a send, done or refused; it may have swallowed the edge that announces input."""
        events: int = self._get(EVENTS)
        self._must_look = False
        if events & POLLIN:
            self.schedule()
        return events

    def close(self, linger: int = LINGER_MS) -> None:
        if self.is_open:
            self.is_open = False
            self.loop.remove_reader(self._fd)
            self.socket.close(linger)


class _Monitor(Reader):
    """The events of a dialled socket: its end is heard here at once."""

    def __init__(self, dialled: "Dialled") -> None:
        self._dialled = dialled
        self._parent = dialled.socket
        super().__init__(self._parent.get_monitor_socket(functools.reduce(operator.or_, REASONS)))

    def take(self) -> None:
        event = recv_monitor_message(self.socket, zmq.NOBLOCK)
        reason = self._dialled.reasons.get(zmq.Event(event["event"]), "lost")
        self._dialled.lost(f"{reason} at {event['endpoint'].decode()}")

    def close(self, linger: int = 0) -> None:
        if self.is_open:
            self._parent.disable_monitor()
        super().close(0)


class Dialled(Reader):
    """A connection this node opened: a DEALER of its own."""

    reasons = REASONS

    def __init__(self, transport: "ZmqTransport", socket: "zmq.Socket[bytes]") -> None:
        self.transport = transport
        self._received = transport.listener.received
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        # Queue until connected: Hello is sent at once, and nothing else before Welcome.
        socket.setsockopt(zmq.IMMEDIATE, 0)
        super().__init__(socket)
        try:
            self._monitor = _Monitor(self)
        except zmq.ZMQError:
            super().close(0)
            raise

    def take(self) -> None:
        self._received(self, self._recv(NOBLOCK))

    def send(self, batch: bytes | bytearray) -> bool:
        if not self.is_open:
            return True
        for _ in range(2):
            try:
                self._send(batch, NOBLOCK)
                if not self._is_draining:
                    self.after_send()
                return True
            except zmq.Again:
                # Spurious at times: looking at the events lets ZeroMQ process its own commands.
                if not self.after_send() & POLLOUT:
                    return False
        return False

    def lost(self, reason: str) -> None:
        if self.is_open:
            self._drain_rest()
            self.close(0)  # Nobody is there to linger for.
            self.transport.listener.closed(self, reason)

    def _drain_rest(self) -> None:
        # What arrived before the end still counts: a last answer, a Bye. A plain recv may not see it yet.
        try:
            while not self.is_closed():
                self.events()
                self.take()
        except zmq.Again:
            return

    def close(self, linger: int = LINGER_MS) -> None:
        if self.is_open:
            self._monitor.close()
            self.transport.forget(self)
            super().close(linger)


class Accepted:
    """A connection somebody else opened: a routing id of the ROUTER."""

    def __init__(self, router: "BoundRouter", routing_id: bytes) -> None:
        self._router = router
        self._routing_id = routing_id

    def send(self, batch: bytes | bytearray) -> bool:
        return self._router.send_to(self._routing_id, self, batch)

    def close(self) -> None:
        self._router.peers.pop(self._routing_id, None)


class BoundRouter(Reader):
    """The bound socket: every peer that dialled, by routing id."""

    def __init__(self, transport: "ZmqTransport", socket: "zmq.Socket[bytes]") -> None:
        self.transport = transport
        self._received = transport.listener.received
        self.peers: dict[bytes, Accepted] = {}
        super().__init__(socket)

    def take(self) -> None:
        routing_id = self._recv(NOBLOCK)
        frame = self._recv(NOBLOCK, False)
        batch = frame.bytes
        while frame.more:  # One payload frame is the protocol; empty is refused.
            batch = b""
            frame = self._recv(NOBLOCK, False)
        peer = self.peers.get(routing_id)
        if peer is None:
            peer = self.peers[routing_id] = Accepted(self, routing_id)
            self.transport.listener.accepted(peer)
        self._received(peer, batch)

    def send_to(self, routing_id: bytes, peer: Accepted, batch: bytes | bytearray) -> bool:
        if not self.is_open or routing_id not in self.peers:
            return True
        for _ in range(2):
            try:
                self._send(routing_id, NOBLOCK_SNDMORE)
                self._send(batch, NOBLOCK)
                if not self._is_draining:
                    self.after_send()
                return True
            except zmq.Again:
                self.after_send()
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                del self.peers[routing_id]
                self.loop.call_soon(self.transport.listener.closed, peer, "the peer is gone")
                return True
        return False


class ZmqTransport:
    """Endpoints such as ``ipc:///path`` and ``tcp://127.0.0.1:7000`` (port 0 or ``*``: any free one).

    Beyond ipc and loopback it takes keys (keyed.py).
    """

    listener: Listener
    has_keys = False
    max_message_bytes = MAX_FRAME_BYTES + MAX_BATCH_BYTES

    def __init__(self, *, handshake_s: float = HANDSHAKE_S) -> None:
        self.exchange: dict[str, Any] | None = None
        self._handshake_ms = int(handshake_s * 1000)
        self._context = zmq.Context()
        self._router: BoundRouter | None = None
        self._dialled: dict[Dialled, None] = {}

    def socket(self, kind: int, endpoint: str = "") -> "zmq.Socket[bytes]":
        """Return a socket with the bounds that all sockets here have."""
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        # Bounds each part of a message. What bounds their number is who may connect (SECURITY.md):
        # ZeroMQ keeps all parts of an unfinished message, past every high-water mark, until its sender is gone.
        socket.setsockopt(zmq.MAXMSGSIZE, self.max_message_bytes)
        socket.setsockopt(zmq.HANDSHAKE_IVL, self._handshake_ms)
        socket.setsockopt(zmq.IPV6, "[" in endpoint)
        return socket

    def router(self, socket: "zmq.Socket[bytes]") -> BoundRouter:
        """Prepare a socket that is about to be bound."""
        return BoundRouter(self, socket)

    def dialled(self, socket: "zmq.Socket[bytes]", node: str) -> Dialled:
        """Prepare a socket that is about to be connected to the node of that name."""
        return Dialled(self, socket)

    async def start(self, endpoint: str, listener: Listener) -> str:
        self.listener = listener
        if not endpoint:
            return ""
        try:
            check_listening(endpoint, has_keys=self.has_keys)
        except OSError as error:
            self._context.term()
            raise OSError(f"cannot listen at {endpoint}: {error}") from None
        try:
            socket = self.socket(zmq.ROUTER, endpoint)
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._router = self.router(socket)
            if endpoint.startswith("ipc://") and _is_listening(endpoint.removeprefix("ipc://")):
                raise zmq.ZMQError(zmq.EADDRINUSE)
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._close()
            self._context.term()
            raise OSError(error.errno, f"cannot listen at {endpoint}: {error.strerror}") from None
        return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def dial(self, endpoint: str, node: str = "") -> Connection:
        try:
            check_dialling(endpoint, has_keys=self.has_keys)
            dialled = self.dialled(self.socket(zmq.DEALER, endpoint), node)
        except OSError as error:
            raise OSError(f"cannot dial {endpoint}: {error}") from None
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"cannot dial {endpoint}: {error.strerror}") from None
        self._dialled[dialled] = None
        try:
            dialled.socket.connect(endpoint)
        except zmq.ZMQError as error:
            asyncio.get_running_loop().call_soon(dialled.lost, f"cannot dial {endpoint}: {error.strerror}")
        return dialled

    def forget(self, dialled: Dialled) -> None:
        """Drop a dialled connection that was closed."""
        self._dialled.pop(dialled, None)

    def _close(self) -> None:
        for dialled in list(self._dialled):
            dialled.close()
        if self._router is not None:
            self._router.close()

    async def stop(self) -> None:
        self._close()
        # Returns once what was sent has left, or LINGER_MS has passed: off the loop, which may have work to do.
        # Shielded: a stop that is cancelled before a thread was free would leave the context open.
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, self._context.term))


def _is_listening(path: str) -> bool:
    """Say whether somebody listens on a unix socket: ZeroMQ would take the path away from them without a word."""
    with sockets.socket(sockets.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True
