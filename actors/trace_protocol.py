"""The messages between a node's tracer actor (tracer.py) and those who watch. Fields are positional: append only."""

from typing import Literal

from callboard.bus import Ask, Message, Stream
from callboard.bus.taps import TapRecord

TRACER = "tracer.node"
"""The name of the actor on every node of a fleet: ``Address(node, endpoint, TRACER)``."""

Bodies = Literal["none", "hashed", "full"]


class Records(Message, frozen=True):
    """Some of a node's records, in the order they were made; of the past, one request after another."""

    records: tuple[TapRecord, ...]
    is_past: bool = False
    """From the ring, as asked for or before anything else; else as they happen."""
    num_lost: int = 0
    """Records that were dropped just before these, because whoever follows did not take them in time."""
    num_records: int = 0
    """How many this node has told this follower, these included, the lost too."""
    num_before: int = 0
    """With what is past: how many records of requests the node had made before the first that it tells this follower.
    Who follows again, after its link broke, knows by it how many it has missed."""


class Follow(Stream[Records], frozen=True):
    """The node's records as they happen, a batch every ``every_s`` seconds at most; never ends by itself.

    First come those of the ring (in batches with ``is_past``, at least one, perhaps empty) if ``with_past``, or one
    empty batch. A follower that does not read loses records, counted. Raises BadRequest for bodies that the fleet
    does not give out.
    """

    with_past: bool = True
    everything: bool = False
    """Also messages that belong to no request."""
    every_s: float = 0.05
    bodies: Bodies = "none"
    salt: bytes = b""
    """Mixed into the hashes of prompts: equal blocks of one recording have equal hashes, of two they have not."""


class GetRecords(Stream[Records], frozen=True):
    """What the ring holds of one request (``ID`` with its later sequences ``ID.1``, ...), or of all if it is empty.

    In several messages, at least one.
    """

    of: str = ""
    """Not named request_id: to ask for a request's records is not to be one of them."""


class Moment(Message, frozen=True):
    """A node's clocks, and which start of which process on which host they are of."""

    now: float
    wall: float
    host: str
    """Equal hosts share the clock that ``now`` is of."""
    incarnation: str


class GetMoment(Ask[Moment], frozen=True):
    """What time is it? Asked several times, the fastest answer says how far two clocks are apart."""
