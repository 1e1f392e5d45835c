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
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from callboard.bus.frames import MAX_BATCH_BYTES, MAX_FRAME_BYTES

from .contract import Connection, Listener

DRAIN_PER_PASS = 256
"""Messages taken from one socket in one loop pass, before others get their turn."""
HIGH_WATER_MARK = 1000
LINGER_MS = 500

_REASONS = {
    zmq.EVENT_DISCONNECTED: "disconnected",
    zmq.EVENT_CLOSED: "nobody listens",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "the handshake failed",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the key was refused",
}
"""Monitor events that end a dialled connection, in words."""


class _Reader:
    """Drains one ZeroMQ socket on its descriptor."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self.socket = socket
        self.loop = asyncio.get_running_loop()
        self.is_open = True
        self._is_scheduled = False
        self._fd = int(socket.getsockopt(zmq.FD))
        self.loop.add_reader(self._fd, self.drain)
        self.schedule()

    def schedule(self) -> None:
        if not self._is_scheduled and self.is_open:
            self._is_scheduled = True
            self.loop.call_soon(self._scheduled)

    def _scheduled(self) -> None:
        self._is_scheduled = False
        self.drain()

    def drain(self) -> None:
        if not self.is_open:
            return
        try:
            for _ in range(DRAIN_PER_PASS):
                if self.is_closed():
                    return
                self.take()
        except zmq.Again:
            return
        except Exception:
            self.schedule()  # The descriptor tells of what is left only once.
            raise
        self.schedule()

    def is_closed(self) -> bool:
        """Return whether the socket is closed; taking a message may close it."""
        return not self.is_open

    def take(self) -> None:
        """Receive one message and deliver it. Raises zmq.Again when there is none."""
        raise zmq.Again

    def events(self) -> int:
        """Return what the socket is ready for; asking also lets ZeroMQ process its own commands."""
        return int(self.socket.getsockopt(zmq.EVENTS))

    def after_send(self) -> int:
        """Return the events after a send, done or refused; it may have swallowed the edge that announces input."""
        # Hot: once per batch sent (bench/bus.py).
        events = self.events()
        if events & zmq.POLLIN:
            self.schedule()
        return events

    def close(self, linger: int = LINGER_MS) -> None:
        if self.is_open:
            self.is_open = False
            self.loop.remove_reader(self._fd)
            self.socket.close(linger)


class _Monitor(_Reader):
    """The events of a dialled socket: its end is heard here at once."""

    def __init__(self, dialled: "_Dialled") -> None:
        self._dialled = dialled
        self._parent = dialled.socket
        super().__init__(self._parent.get_monitor_socket(functools.reduce(operator.or_, _REASONS)))

    def take(self) -> None:
        event = recv_monitor_message(self.socket, zmq.NOBLOCK)
        self._dialled.lost(f"{_REASONS.get(zmq.Event(event['event']), 'lost')} at {event['endpoint'].decode()}")

    def close(self, linger: int = 0) -> None:
        if self.is_open:
            self._parent.disable_monitor()
        super().close(0)


class _Dialled(_Reader):
    """A connection this node opened: a DEALER of its own."""

    def __init__(self, transport: "ZmqTransport") -> None:
        self.transport = transport
        socket = transport.socket(zmq.DEALER)
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
        self.transport.listener.received(self, self.socket.recv(zmq.NOBLOCK))

    def send(self, batch: bytes) -> bool:
        if not self.is_open:
            return True
        for _ in range(2):
            try:
                self.socket.send(batch, zmq.NOBLOCK)
                self.after_send()
                return True
            except zmq.Again:
                # Spurious at times: looking at the events lets ZeroMQ process its own commands.
                if not self.after_send() & zmq.POLLOUT:
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


class _Accepted:
    """A connection somebody else opened: a routing id of the ROUTER."""

    def __init__(self, router: "_Router", routing_id: bytes) -> None:
        self._router = router
        self._routing_id = routing_id

    def send(self, batch: bytes) -> bool:
        return self._router.send_to(self._routing_id, self, batch)

    def close(self) -> None:
        self._router.peers.pop(self._routing_id, None)


class _Router(_Reader):
    """The bound socket: every peer that dialled, by routing id."""

    def __init__(self, transport: "ZmqTransport", socket: "zmq.Socket[bytes]") -> None:
        self.transport = transport
        self.peers: dict[bytes, _Accepted] = {}
        super().__init__(socket)

    def take(self) -> None:
        routing_id, *payload = self.socket.recv_multipart(zmq.NOBLOCK)
        batch = payload[0] if len(payload) == 1 else b""  # One payload frame is the protocol; empty is refused.
        peer = self.peers.get(routing_id)
        if peer is None:
            peer = self.peers[routing_id] = _Accepted(self, routing_id)
            self.transport.listener.accepted(peer)
        self.transport.listener.received(peer, batch)

    def send_to(self, routing_id: bytes, peer: _Accepted, batch: bytes) -> bool:
        if not self.is_open or routing_id not in self.peers:
            return True
        for _ in range(2):
            try:
                self.socket.send_multipart((routing_id, batch), zmq.NOBLOCK)
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
    """Endpoints such as ``ipc:///path`` and ``tcp://127.0.0.1:7000`` (port 0 or ``*``: any free one)."""

    listener: Listener

    def __init__(self) -> None:
        self.exchange: dict[str, Any] | None = None
        self._context = zmq.Context()
        self._router: _Router | None = None
        self._dialled: dict[_Dialled, None] = {}

    def socket(self, kind: int) -> "zmq.Socket[bytes]":
        """Return a socket with the bounds that all sockets here have."""
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES + MAX_BATCH_BYTES)
        return socket

    async def start(self, endpoint: str, listener: Listener) -> str:
        self.listener = listener
        if not endpoint:
            return ""
        socket = self.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            if endpoint.startswith("ipc://") and _is_listening(endpoint.removeprefix("ipc://")):
                raise zmq.ZMQError(zmq.EADDRINUSE)
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close(0)
            self._context.term()
            raise OSError(error.errno, f"cannot listen at {endpoint}: {error.strerror}") from None
        self._router = _Router(self, socket)
        return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def dial(self, endpoint: str) -> Connection:
        try:
            dialled = _Dialled(self)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"cannot dial {endpoint}: {error.strerror}") from None
        self._dialled[dialled] = None
        try:
            dialled.socket.connect(endpoint)
        except zmq.ZMQError as error:
            asyncio.get_running_loop().call_soon(dialled.lost, f"cannot dial {endpoint}: {error.strerror}")
        return dialled

    def forget(self, dialled: _Dialled) -> None:
        """Drop a dialled connection that was closed."""
        self._dialled.pop(dialled, None)

    async def stop(self) -> None:
        for dialled in list(self._dialled):
            dialled.close()
        if self._router is not None:
            self._router.close()
        # Returns once what was sent has left, or LINGER_MS has passed: off the loop, which may have work to do.
        await asyncio.get_running_loop().run_in_executor(None, self._context.term)


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
