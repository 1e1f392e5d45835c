"""Nodes of one process: batches pass through the event loop, still encoded, so that tests run the real codec."""

import asyncio
from contextvars import Context, copy_context
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


class InprocConnection:
    """One end; ``other`` is the far one, None once either has closed."""

    def __init__(self, transport: "InprocTransport") -> None:
        self.transport = transport
        self.other: InprocConnection | None = None

    def send(self, batch: bytes | bytearray) -> bool:
        if self.other is not None:
            other = self.other
            asyncio.get_running_loop().call_soon(other._receive, batch, context=other.transport.context)
        return True

    def close(self) -> None:
        other, self.other = self.other, None
        self.transport.forget(self)
        if other is not None:
            asyncio.get_running_loop().call_soon(other._closed, "closed by the other side")

    def _receive(self, batch: bytes | bytearray) -> None:
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
        self.connections: dict[Connection, None] = {}
        self.context = Context()
        """That of the start: what comes is not taken in the call of whoever sent it."""

    async def start(self, endpoint: str, listener: Listener) -> str:
        if endpoint in self.hub.transports:
            raise OSError(f"{endpoint} is taken")
        self.endpoint, self.listener, self.context = endpoint, listener, copy_context()
        if endpoint:
            self.hub.transports[endpoint] = self
        return endpoint

    def dial(self, endpoint: str, node: str = "") -> Connection:
        near = InprocConnection(self)
        peer = self.hub.transports.get(endpoint)
        if peer is None:
            asyncio.get_running_loop().call_soon(self.listener.closed, near, f"nobody listens at {endpoint}")
            return near
        far = InprocConnection(peer)
        near.other, far.other = far, near
        self.connections[near] = peer.connections[far] = None
        peer.listener.accepted(far)
        return near

    def forget(self, connection: Connection) -> None:
        """Drop a connection that was closed."""
        self.connections.pop(connection, None)

    async def stop(self) -> None:
        if self.hub.transports.get(self.endpoint) is self:
            del self.hub.transports[self.endpoint]
        for connection in list(self.connections):
            connection.close()
