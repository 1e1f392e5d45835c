"""One node's records, as they come: which are new, which were missed, and what its clock says of their times."""

import asyncio
from collections import deque
from collections.abc import Iterable

from callboard.actors.trace_protocol import Moment, Records
from callboard.bus import Address, Node
from callboard.bus.taps import TapRecord

from .clocks import NodeClock
from .event import Event, event_of

NUM_KNOWN = 8192
"""Records that are known again when a link broke and the ring tells of them a second time: more than come late."""


class Followed:
    """One node, and how far it has been read."""

    def __init__(self, tracer: Address) -> None:
        self.tracer = tracer
        self.name = tracer.node
        self.clock = NodeClock()
        self.host = self.incarnation = ""
        """Of the process that was asked last."""
        self.attached_to = ""
        """The incarnation of the process that was read last."""
        self.is_kept = False
        """Somebody sees to it that it is followed."""
        self.is_attached = False
        self.is_refused = False
        self.refused_at = 0.0
        self.is_in_past = False
        """What its ring remembers is coming."""
        self.has_told_past = asyncio.Event()
        """Or was out of reach."""
        self.attached_at = self.detached_at = 0.0
        self.num_lost = 0
        """Not told of yet."""
        self.num_caught_up = 0
        """Records of its past that were new, when it was reached again."""
        self._known: deque[tuple[float, int, int]] = deque()
        self._again: set[tuple[float, int, int]] = set()
        self._since = 0.0
        """What is not later was told, or is not to be."""
        self._num_made: int | None = None
        """Records of requests that its process had made at the last one that was told, where that is known."""
        self._num_made_then: int | None = None
        """The same when the link broke."""
        self._num_before = self._num_seen = 0

    def begin(self, moment: Moment, *, with_past: bool) -> None:
        """Prepare for a new stream, of the process that gave ``moment``; forget the last one if that is another."""
        self.is_in_past = True
        self.num_caught_up = self._num_seen = self._num_before = 0
        if moment.incarnation != self.attached_to:
            self._known.clear()
            self._num_made = None
            self._since = 0.0 if with_past else moment.now
        self._num_made_then = self._num_made
        self._again = set(self._known)
        self.host, self.incarnation = moment.host, moment.incarnation

    def take(self, batch: Records) -> list[TapRecord]:
        """Return the records that were not told before."""
        num = sum(1 for record in batch.records if record.request_id)
        if not batch.is_past:
            self.num_lost += batch.num_lost
            self._num_made = (self._num_made or 0) + num + batch.num_lost
            self._know(batch.records)
            return list(batch.records)
        self._num_before = batch.num_before
        new = [record for record in batch.records if self._is_new(record)]
        self._num_seen += num - len(new)
        self.num_caught_up += len(new)
        if self._num_made is not None:  # Told already, should the link break before all of the past is.
            self._num_made += len(new)
        self._know(new)
        return new

    def _know(self, records: Iterable[TapRecord]) -> None:
        known = self._known
        known.extend((record.time, record.what, record.span) for record in records)
        while len(known) > NUM_KNOWN:
            self._since = max(self._since, known.popleft()[0])

    def _is_new(self, record: TapRecord) -> bool:
        return record.time > self._since and (record.time, record.what, record.span) not in self._again

    def end_past(self) -> int:
        """Note that the past has been told; return how many records can be had no more."""
        made_then = self._num_made_then
        num_missed = 0 if made_then is None else max(0, self._num_before + self._num_seen - made_then)
        self._num_made = self._num_before + self._num_seen + self.num_caught_up
        self.is_in_past = False
        self.has_told_past.set()
        return num_missed


def events_of(node: Node, name: str, clock: NodeClock, records: Iterable[TapRecord]) -> list[Event]:
    """Return another node's records as events on the clock of ``node``."""
    now = node.clock.now()
    here, wall_s = clock.offset(now), node.clock.wall() - now
    events = []
    for record in records:
        # A clock that is another's may have drifted since: the longer ago it was, the less is known.
        then = here if clock.is_shared else clock.offset(record.time + here.seconds)
        events.append(event_of(record, name, offset_s=then.seconds, error_s=then.error_s, wall_s=wall_s))
    return events
