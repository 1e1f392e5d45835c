"""Bare ZeroMQ sockets that speak the bus's frames, and keep to its rules only as far as a test wants."""

import asyncio
from typing import Any

import msgspec
import zmq

from callboard.bus.frames import PROTOCOL_VERSION, Frame, Hello, Ping, Welcome, decode_batch, encode_batch


class _Raw:
    """One socket that numbers its batches. ``incarnation`` and ``sequence`` are the test's to change."""

    def __init__(self, kind: int, incarnation: str) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(kind)
        self.socket.linger = 0
        self.incarnation = incarnation
        self.sequence = 0
        self.batches: list[tuple[int, int]] = []
        """Of those heard: bytes, and number of frames."""
        self._heard: list[Any] = []

    async def send(self, *frames: Frame) -> None:
        """Send a batch, once there is room for it."""
        batch = encode_batch((self.incarnation, self.sequence, frames))
        while True:
            try:
                self.socket.send_multipart(self._parts(batch), zmq.NOBLOCK)
                break
            except zmq.Again:
                await asyncio.sleep(0)
        self.sequence += 1

    async def next(self, kind: type[Frame] | None = None, seconds: float = 10.0) -> Any:
        """Return the next frame (but Ping), of a kind if given, whatever comes before it. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while True:
                while self._heard:
                    frame = self._heard.pop(0)
                    if type(frame) is (kind or type(frame)):
                        return frame
                while not self.socket.poll(0):
                    await asyncio.sleep(0.001)
                batch = self._take(self.socket.recv_multipart())
                frames = decode_batch(batch)[2]
                self.batches.append((len(batch), len(frames)))
                self._heard = [frame for frame in frames if type(frame) is not Ping]

    def _parts(self, batch: bytes) -> list[bytes]:
        return [batch]

    def _take(self, parts: list[bytes]) -> bytes:
        return parts[-1]

    def close(self) -> None:
        self.socket.close(0)
        self._context.term()


class RawDialler(_Raw):
    """A DEALER that dials a node."""

    def __init__(self, endpoint: str, *, incarnation: str = "raw") -> None:
        super().__init__(zmq.DEALER, incarnation)
        self.socket.connect(endpoint)

    async def hello(self, *, endpoint: str = "", **fields: Any) -> None:
        """Greet and be welcomed."""
        await self.send(hello(self.incarnation, endpoint=endpoint, **fields))
        await self.next(Welcome)


class RawListener(_Raw):
    """A ROUTER that is dialled."""

    def __init__(self, endpoint: str, *, incarnation: str = "raw") -> None:
        super().__init__(zmq.ROUTER, incarnation)
        self.socket.router_mandatory = 1  # Else it drops what finds no room.
        self.socket.bind(endpoint)
        self.endpoint = endpoint
        self._routing_id = b""

    async def welcome(self) -> None:
        """Be greeted and welcome whoever it is."""
        greeting = await self.next(Hello)
        self.sequence = 0
        await self.send(Welcome(greeting.version, greeting.fleet, "raw", self.incarnation, self.endpoint))

    def _parts(self, batch: bytes) -> list[bytes]:
        return [self._routing_id, batch]

    def _take(self, parts: list[bytes]) -> bytes:
        self._routing_id = parts[0]
        return parts[-1]


def hello(incarnation: str, *, endpoint: str = "", **fields: Any) -> Hello:
    """Return a greeting that a node of no fleet accepts."""
    greeting = Hello(PROTOCOL_VERSION, "", "raw", incarnation, endpoint)
    return msgspec.structs.replace(greeting, **fields)
