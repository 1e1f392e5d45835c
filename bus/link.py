"""One link between two nodes: a handshake, numbered batches out (outbox.py), numbered batches in.

Messages on a link arrive in order and at most once; a gap in the numbers, or a peer that is silent for too long, breaks
it. A link breaks as a whole: everything asked over it ends with an error, everything served over it is cancelled, and
whoever wants to go on dials a new one.
"""

from collections.abc import Callable, Sequence
from typing import Any

from .calls import Asked, Served
from .clock import Clock
from .frames import Bye, Frame, Items, PeerInfo
from .liveness import ProcessWatch
from .outbox import Outbox


class Link(Outbox):
    """A link as one of its two nodes sees it. The node moves it; it keeps no policy of its own."""

    def __init__(self, encode_into: Any, incarnation: str, *, endpoint: str = "", max_backlog_bytes: int) -> None:
        super().__init__(encode_into, incarnation, max_backlog_bytes)
        self.endpoint = endpoint
        self.node = ""
        """Whom this node dials there."""
        self.peer: PeerInfo | None = None
        self.peer_node = ""
        self.peer_incarnation = ""
        self.is_broken = False
        self.asked: dict[int, Asked] = {}
        """What this node asked of the peer, until its one end."""
        self.served: dict[int, Served] = {}
        """What the peer asked of this node, until its one end."""
        self.last_heard = 0.0
        self.watch: ProcessWatch | None = None
        self.dial_until = 0.0
        self._next_id = 0
        self.num_received = 0
        """Batches so far: the next one must have this number."""

    @property
    def name(self) -> str:
        """The peer's node name or endpoint, as far as it is known."""
        return self.peer_node or self.endpoint

    def next_id(self) -> int:
        """Return a new id for something this node asks over the link."""
        self._next_id += 1
        return self._next_id

    def begin_numbering(self) -> None:
        """Count batches from 0: a new connection is a new numbering, also when this link is dialled again."""
        self._sent = self.num_received = 0

    def close(self) -> None:
        """Drop the connection and what is queued; the node ends what was under way."""
        self.is_broken = True
        self.discard()
        if self.watch is not None:
            self.watch.close()
            self.watch = None
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def say_bye(self) -> None:
        """Send what is queued and Bye, without waiting for the end of the pass; what is posted later is dropped."""
        self.post(Bye())
        self._is_silent = True
        if self.is_open:
            self.flush()


class LocalLink(Link):
    """A node's link to itself: frames are handed over as they are, without encoding, in the next loop pass."""

    def __init__(
        self, deliver: Callable[[Link, Sequence[Frame]], None], clock: Clock, node: str, incarnation: str
    ) -> None:
        super().__init__(None, incarnation, max_backlog_bytes=0)
        self.peer_node, self.peer_incarnation = node, incarnation
        self.is_open = True
        self._clock = clock
        self._deliver = deliver

    def post(self, frame: Frame) -> int:
        if not self._is_silent:
            self._loop.call_soon(self._take, frame)
        return 0

    def post_item(self, stream: int, item: Any) -> None:
        body: Any = [item]  # As it is; typed Raw for what comes from elsewhere.
        self.post(Items(stream, body))

    def _take(self, frame: Frame) -> None:
        self.last_heard = self._clock.now()
        self._deliver(self, (frame,))

    def schedule_flush(self) -> None:
        return
