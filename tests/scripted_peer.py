"""The far side of a node's links, frame by frame as a test wants it, on the in-process transport."""

from typing import Any

from callboard.bus.frames import PROTOCOL_VERSION, Frame, Hello, Ping, Pong, Welcome, decode_batch, encode_batch
from callboard.bus.transports.contract import Connection
from callboard.bus.transports.inproc import InprocHub


class Line:
    """One connection of the peer: what was heard on it."""

    def __init__(self, connection: Connection, incarnation: str) -> None:
        self.connection = connection
        self.is_open = True
        self.heard: list[Any] = []
        """All frames but greetings, Pings and Pongs."""
        self._incarnation = incarnation
        self._sequence = 0

    def send(self, *frames: Frame) -> None:
        self.connection.send(encode_batch((self._incarnation, self._sequence, frames)))
        self._sequence += 1


class ScriptedPeer:
    """A node named ``peer`` that greets as it must and for the rest does what it is told. ``start`` it first."""

    def __init__(self, hub: InprocHub, endpoint: str) -> None:
        self.endpoint = endpoint
        self.incarnation = "first"
        self.lines: list[Line] = []
        self._transport = hub.transport()
        self._of: dict[Connection, Line] = {}

    async def start(self) -> None:
        await self._transport.start(self.endpoint, self)

    async def stop(self) -> None:
        await self._transport.stop()

    def dial(self, endpoint: str) -> Line:
        """Greet a node."""
        line = self._add(self._transport.dial(endpoint))
        line.send(self._greeting(Hello))
        return line

    def cut(self, line: Line) -> None:
        """Drop a connection without a word."""
        line.is_open = False
        line.connection.close()

    # ---- the transport's listener --------------------------------------------------------------------------------

    def accepted(self, connection: Connection) -> None:
        self._add(connection)

    def received(self, connection: Connection, batch: bytes | bytearray) -> None:
        line = self._of[connection]
        for frame in decode_batch(batch)[2]:
            match frame:
                case Hello():
                    line.send(self._greeting(Welcome))
                case Ping():
                    line.send(Pong())
                case Welcome() | Pong():
                    pass
                case _:
                    line.heard.append(frame)

    def closed(self, connection: Connection, reason: str) -> None:
        self._of[connection].is_open = False

    def _add(self, connection: Connection) -> Line:
        line = self._of[connection] = Line(connection, self.incarnation)
        self.lines.append(line)
        return line

    def _greeting(self, kind: type[Any]) -> Frame:
        greeting: Frame = kind(PROTOCOL_VERSION, "", "peer", self.incarnation, self.endpoint)
        return greeting
