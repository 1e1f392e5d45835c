"""Nodes of one process: batches pass through the event loop, still encoded, so that tests run the real codec."""

import asyncio
from typing import Any

from .contract import Connection, Listener


class InprocHub:
    """The nodes that can reach each other. ``exchange`` is for objects they share in place of shared memory."""

    def __init__(self) -> None:
        self.transports: dict[str, InprocTransport] = {}
        self.exchange: dict[str, Any] = {}

    def transport(self) -> "InprocTransport":
        """Return a new transport on this hub, for one node."""
        return InprocTransport(self)

    def delay(self, sender: str, receiver: str) -> float:
        """Return how long a batch takes, in seconds: nothing here (sim.py says otherwise)."""
        return 0.0


class InprocConnection:
    """One end; ``other`` is the far one. Batches arrive in the order they were sent, whatever their delays."""

    def __init__(self, transport: "InprocTransport", far: str) -> None:
        self.transport = transport
        self.far = far
        self.other: InprocConnection | None = None
        self._arrival = 0.0

    def send(self, batch: bytes) -> bool:
        if self.other is not None:
            self._later(self.other._receive, batch)
        return True

    def close(self) -> None:
        other, self.other = self.other, None
        self.transport.forget(self)
        if other is not None:
            self._later(other._closed, "closed by the other side")

    def cut(self) -> None:
        """Break the pipe: what is under way in either direction is lost, and both ends hear of it."""
        for end in (self, self.other):
            if end is not None:
                end._closed("cut")

    def _later(self, call: Any, argument: Any) -> None:
        loop = asyncio.get_running_loop()
        delay = self.transport.hub.delay(self.transport.endpoint, self.far)
        if delay <= 0:
            loop.call_soon(call, argument)
            return
        # A nanosecond apart at least: timers of equal time run in any order.
        self._arrival = max(self._arrival + 1e-9, loop.time() + delay)
        loop.call_at(self._arrival, call, argument)

    def _receive(self, batch: bytes) -> None:
        if self.other is not None:
            self.transport.listener.received(self, batch)

    def _closed(self, reason: str) -> None:
        if self.other is not None:
            self.other = None
            self.transport.forget(self)
            self.transport.listener.closed(self, reason)


class InprocTransport:
    """One node's transport on a hub."""

    listener: Listener

    def __init__(self, hub: InprocHub) -> None:
        self.hub = hub
        self.endpoint = ""
        self.exchange = hub.exchange
        self.connections: dict[InprocConnection, None] = {}

    async def start(self, endpoint: str, listener: Listener) -> str:
        if endpoint in self.hub.transports:
            raise OSError(f"{endpoint} is taken")
        self.endpoint, self.listener = endpoint, listener
        if endpoint:
            self.hub.transports[endpoint] = self
        return endpoint

    def dial(self, endpoint: str) -> Connection:
        near = InprocConnection(self, endpoint)
        peer = self.hub.transports.get(endpoint)
        if peer is None:
            asyncio.get_running_loop().call_soon(self._refused, near, endpoint)
            return near
        far = InprocConnection(peer, self.endpoint)
        near.other, far.other = far, near
        self.connections[near] = peer.connections[far] = None
        peer.listener.accepted(far)
        return near

    def _refused(self, near: InprocConnection, endpoint: str) -> None:
        self.listener.closed(near, f"nobody listens at {endpoint}")

    def forget(self, connection: InprocConnection) -> None:
        """Drop a connection that was closed."""
        self.connections.pop(connection, None)

    async def stop(self) -> None:
        if self.hub.transports.get(self.endpoint) is self:
            del self.hub.transports[self.endpoint]
        for connection in list(self.connections):
            connection.close()
