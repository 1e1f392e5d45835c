"""What the parts of a node share: who it is, its time, and the way out. The node itself is one of these."""

from typing import Any

from .clock import Clock
from .taps import Tap
from .transports.contract import Transport


class Place:
    """A node as its links and its server see it."""

    def __init__(
        self, name: str, *, fleet: str, endpoint: str, incarnation: str, clock: Clock, transport: Transport
    ) -> None:
        self.name = name
        self.fleet = fleet
        self.endpoint = endpoint
        self.incarnation = incarnation
        self.clock = clock
        self.transport = transport
        self.exchange: dict[str, Any] | None = getattr(transport, "exchange", None)
        """Objects shared with the other nodes of this process; None between processes."""
        self.tap: Tap | None = None
        """Called once per message sent and received; None costs one attribute test."""
