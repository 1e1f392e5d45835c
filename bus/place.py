"""What the parts of a node share: who it is, its time, and the way out. The node itself is one of these."""

from typing import TYPE_CHECKING, Any

from .calls import Call
from .clock import Clock
from .deadlines import Deadlines
from .notes import TURN_S, Turns
from .taps import NO_BODY, REQUEST_ID, SPAN, Follower, Row, Trace, encode_facts, written
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
        self.trace = Trace()
        """The records of requests."""
        self.tap: Follower | None = None
        """Called with the records of all other messages; None costs one attribute test a message."""
        self._everything: tuple[Follower, ...] = ()
        # A random half and a counter: unlike those of all other nodes, and nothing is drawn for it.
        self._next_span = (int(incarnation, 16) & 0xFFFFFFFF) << 32

    # ---- records -------------------------------------------------------------------------------------------------

    def new_span(self) -> int:
        """Return an id for a call or a span, which no other in the fleet has: 64 bits, not 0."""
        self._next_span += 1
        return self._next_span

    def note(
        self,
        call: Call | None,
        name: str,
        begin: float,
        *,
        end: float | None = None,
        actor: str = "",
        span: int = 0,
        error: str = "",
        **facts: Any,
    ) -> None:
        """Record that an actor did ``name`` for a call's request, from ``begin`` on this node's clock until now.

        ``actor`` is by default the one that serves the call. Nothing is recorded of what belongs to no request.
        """
        if call is None or not call.request_id:
            return
        self.trace.add(
            (
                *(SPAN, self.clock.now() if end is None else end, begin, actor or call.actor, "", "", name),
                *(call.request_id, span or self.new_span(), call.span, 0, 0, 0.0, written(error)),
                *(encode_facts(facts), NO_BODY),
            )
        )

    def begin_turn(self, call: Turns | None) -> None:
        """From here on it is the turn of a call's handler, until it sends something: ``call.sent_s``."""
        if call is not None and call.span:
            call.sent_s = 0.0

    def note_turn(self, call: Call | None, begin: float, name: str = "turn", *, end: float | None = None) -> None:
        """Record what kept an actor from its next message since ``begin``, if it took long: its process, mostly."""
        if end is None:
            end = self.clock.now()
        if end - begin >= TURN_S:
            self.note(call, name, begin, end=end)

    def record(self, row: Row, message: Any = None) -> None:
        """Take a record, of a request or not; see Follower."""
        if row[REQUEST_ID]:
            self.trace.add(row, message)
        elif self.tap is not None:
            self.tap(row, message)

    def follow(self, follower: Follower, *, everything: bool = False) -> None:
        """Call ``follower`` with every record of a request, or with every record, until ``unfollow``."""
        self.trace.followers = (*self.trace.followers, follower)
        if everything:
            self._set_everything((*self._everything, follower))

    def unfollow(self, follower: Follower) -> None:
        """Do so no longer. A repeat does nothing."""
        self.trace.followers = tuple(each for each in self.trace.followers if each != follower)
        self._set_everything(tuple(each for each in self._everything if each != follower))

    def _set_everything(self, followers: tuple[Follower, ...]) -> None:
        self._everything = followers
        self.tap = None if not followers else followers[0] if len(followers) == 1 else self._tell_all

    def _tell_all(self, row: Row, message: Any) -> None:
        for follower in self._everything:
            follower(row, message)
