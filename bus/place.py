"""What the parts of a node share: who it is, its time, and the way out. The node itself is one of these."""

from typing import TYPE_CHECKING, Any

from .clock import Clock
from .deadlines import Deadlines
from .taps import Tap
from .transports.contract import Transport

if TYPE_CHECKING:
    from .keys import FleetKeys


class Place:
    """A node as its links and its server see it."""

    def __init__(
        self,
        name: str,
        *,
        fleet: str,
        endpoint: str,
        incarnation: str,
        clock: Clock,
        transport: Transport,
        keys: "FleetKeys | None" = None,
    ) -> None:
        self.name = name
        self.fleet = fleet
        self.endpoint = endpoint
        self.incarnation = incarnation
        self.clock = clock
        self.transport = transport
        self.keys = keys
        """Those of the fleet; None where it has none."""
        self.exchange: dict[str, Any] | None = getattr(transport, "exchange", None)
        """Objects shared with the other nodes of this process; None between processes."""
        self.deadlines: Deadlines
        """Of all calls at this node; there since its start."""
        self.tap: Tap | None = None
        """Called once per message sent and received; None costs one attribute test."""
