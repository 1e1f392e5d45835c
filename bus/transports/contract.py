"""What a transport is: something that carries batches between two nodes, in order, or says that it broke.

A fake one is a few lines (inproc.py). Transports know nothing of frames, actors or retries.
"""

from typing import Protocol


class Connection(Protocol):
    """One end of a pipe between two nodes."""

    def send(self, batch: bytes | bytearray) -> bool:
        """Hand over one batch, for good. False means no room now: nothing was taken, try again shortly."""

    def close(self) -> None:
        """Drop the connection. A repeat does nothing, and ``closed`` is not called for it."""


class Listener(Protocol):
    """Who hears of connections: the node."""

    def accepted(self, connection: Connection) -> None:
        """Somebody dialled this node."""

    def received(self, connection: Connection, batch: bytes | bytearray) -> None:
        """A batch arrived."""

    def closed(self, connection: Connection, reason: str) -> None:
        """The connection is gone; what was sent on it may not have arrived."""


class Transport(Protocol):
    """A way to be reached at an endpoint and to dial others."""

    async def start(self, endpoint: str, listener: Listener) -> str:
        """Bind to ``endpoint`` (not at all if empty) and return what peers dial. Raises OSError if it is taken."""

    def dial(self, endpoint: str, node: str = "") -> Connection:
        """Open a connection to the node of that name; where it does not listen, ``closed`` follows.

        Raises OSError when out of descriptors, or where the endpoint may not be dialled without keys.
        """

    async def stop(self) -> None:
        """Close everything, giving what was sent a moment to leave."""
