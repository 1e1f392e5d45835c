"""ZeroMQ with the keys of a fleet: every connection is encrypted, and both its ends show that they hold them.

Who is let in is asked by ZAP, and how many were not is told by the bound socket's monitor; both are read on the node's
own loop, as its other sockets are.
"""

import logging
import struct
from collections.abc import Sequence
from typing import Any

import zmq

from callboard.bus.keys import FleetKeys

from .curve import CENSUS_EVENTS, ZAP_ENDPOINT, Census, answer_zap, secure_dealer, secure_router
from .zmq import (
    HANDSHAKE_S,
    KEY_REFUSED,
    LINGER_MS,
    NOBLOCK,
    REASONS,
    Accepted,
    BoundRouter,
    Dialled,
    Reader,
    ZmqTransport,
)

log = logging.getLogger("callboard.bus")

PART_BYTES = 16 * 1024
"""The largest frame. libzmq gathers one of the size that is allowed from anybody, and looks for a key only then: this
is what a stranger's connection may cost, and larger batches go in parts."""
CURVE_BYTES = 64
"""More than encryption adds to a frame (rfc.zeromq.org/spec/26 says 33)."""
LOG_S = 10.0
"""Strangers are told of in the log no more often: they must not fill the disk either."""

_EVENT = struct.Struct("=Hi")
"""The first frame of a monitor's message: the event, and a value that depends on it."""


class _Zap(Reader):
    """Answers for each connection, in its handshake, whether it is let in."""

    def __init__(self, socket: "zmq.Socket[bytes]", keys: FleetKeys) -> None:
        self._keys = keys
        socket.bind(ZAP_ENDPOINT)
        super().__init__(socket)

    def take(self) -> None:
        request = self.socket.recv_multipart(NOBLOCK)
        self.socket.send_multipart(answer_zap(request, self._keys), NOBLOCK)


class _Gate(Reader):
    """The monitor of the bound socket: counts who was not let in."""

    def __init__(self, router: "zmq.Socket[bytes]", name: str) -> None:
        self.census = Census()
        self._name = name
        self._router = router
        self._num_told = 0
        self._told = -LOG_S
        super().__init__(router.get_monitor_socket(CENSUS_EVENTS))

    def take(self) -> None:
        event, _ = self.socket.recv_multipart(NOBLOCK)
        self.census.take(*_EVENT.unpack(event))
        num = self.census.num_strangers
        if num > self._num_told and (now := self.loop.time()) - self._told >= LOG_S:
            self._num_told, self._told = num, now
            log.warning("%s: %d connections without the fleet's keys were turned away so far", self._name, num)

    def close(self, linger: int = 0) -> None:
        if self.is_open:
            # First all that is there: ZeroMQ's thread may wait for room with the lock that disabling takes.
            try:
                while True:
                    self.take()
            except zmq.Again:
                self._router.disable_monitor()
        super().close(0)


class _KeyedRouter(BoundRouter):
    """The bound socket of a node with keys."""

    def __init__(self, transport: "KeyedTransport", socket: "zmq.Socket[bytes]", name: str) -> None:
        super().__init__(transport, socket)
        self._send = _in_parts(socket)
        self._zap: _Zap | None = None
        self.gate: _Gate | None = None
        try:
            self._zap = _Zap(transport.socket(zmq.REP), transport.keys)
            self.gate = _Gate(socket, name)
        except zmq.ZMQError:
            self.close()
            raise
        secure_router(socket, transport.keys, name)

    def take(self) -> None:
        routing_id, *parts = self.socket.recv_multipart(NOBLOCK)
        peer = self.peers.get(routing_id)
        if peer is None:
            peer = self.peers[routing_id] = Accepted(self, routing_id)
            self.transport.listener.accepted(peer)
        self.transport.listener.received(peer, _whole(parts))

    def close(self, linger: int = LINGER_MS) -> None:
        for reader in (self.gate, self._zap):
            if reader is not None:
                reader.close()
        super().close(linger)


class _KeyedDialled(Dialled):
    """A connection that a node with keys opened."""

    # Who is dialled hangs up without a word on a key that is not its own.
    reasons = REASONS | dict.fromkeys(
        (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL),
        f"{KEY_REFUSED} (other keys are used there, or none)",
    )

    def __init__(self, transport: "KeyedTransport", socket: "zmq.Socket[bytes]", node: str) -> None:
        secure_dealer(socket, transport.keys, node)
        super().__init__(transport, socket)
        self._send = _in_parts(socket)

    def take(self) -> None:
        self.transport.listener.received(self, _whole(self.socket.recv_multipart(NOBLOCK)))


class KeyedTransport(ZmqTransport):
    """A transport of the node ``name`` that speaks to holders of the same keys alone, on every endpoint."""

    has_keys = True
    max_message_bytes = PART_BYTES + CURVE_BYTES

    def __init__(self, keys: FleetKeys, name: str, *, handshake_s: float = HANDSHAKE_S) -> None:
        super().__init__(handshake_s=handshake_s)
        self.keys = keys
        self._name = name
        self._gate: _Gate | None = None

    @property
    def num_strangers(self) -> int:
        """Connections turned away because they did not show the fleet's keys."""
        return 0 if self._gate is None else self._gate.census.num_strangers

    def router(self, socket: "zmq.Socket[bytes]") -> BoundRouter:
        made = _KeyedRouter(self, socket, self._name)
        self._gate = made.gate
        return made

    def dialled(self, socket: "zmq.Socket[bytes]", node: str) -> Dialled:
        return _KeyedDialled(self, socket, node)


def _in_parts(socket: "zmq.Socket[bytes]") -> Any:
    def send(data: bytes | bytearray, flags: int) -> None:
        if len(data) <= PART_BYTES:
            socket.send(data, flags)
        else:
            whole = memoryview(data)
            socket.send_multipart([whole[at : at + PART_BYTES] for at in range(0, len(whole), PART_BYTES)], flags)

    return send


def _whole(parts: Sequence[bytes]) -> bytes:
    """Return a batch of its parts; what is too large is none, and its sender is turned away for it."""
    if len(parts) == 1:
        return parts[0]
    return b"" if sum(map(len, parts)) > ZmqTransport.max_message_bytes else b"".join(parts)
