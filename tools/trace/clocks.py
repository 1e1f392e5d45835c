"""How far a node's clock is from ours: asked, bounded, and never believed more than it was measured.

An answer to "what time is it?" was given between our asking and our hearing it. So it bounds the offset between two
clocks by half of the round trip to either side, and the bound holds a while: clocks of computers drift apart by less
than 100 millionths. The bounds of all answers together are narrower than any one's.

Who looks asks, not the nodes each other: nobody else needs to know, and the reader's links lead to every node.
"""

from collections import deque
from dataclasses import dataclass

from callboard.actors.trace_protocol import TRACER, GetMoment, Moment
from callboard.bus import Address, Node
from callboard.bus.liveness import local_host

DRIFT = 100e-6
"""Seconds by which two clocks drift apart in a second, at most."""
NUM_ASKS = 8
NUM_KEPT = 16
ASK_S = 3.0


@dataclass(frozen=True, slots=True)
class Offset:
    """What our clock is ahead of a node's, in seconds, and how far off that may be."""

    seconds: float = 0.0
    error_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer: our clock when it was asked and heard, and what it said."""

    asked: float
    heard: float
    said: float

    @property
    def error_s(self) -> float:
        return (self.heard - self.asked) / 2

    @property
    def time(self) -> float:
        """Our time at the middle of it."""
        return (self.asked + self.heard) / 2

    @property
    def offset_s(self) -> float:
        return self.time - self.said


class NodeClock:
    """The clock of one node's process, as seen from ours."""

    def __init__(self, host: str = "") -> None:
        self.is_shared = False
        """It is the very clock that we read: the node is on this host."""
        self._host = host or local_host()
        self._samples: deque[Sample] = deque(maxlen=NUM_KEPT)

    def take(self, samples: list[Sample], host: str) -> None:
        """Keep the best of one round of answers."""
        best = min(samples, key=lambda sample: sample.error_s)
        # The same host, and yet another clock: a container's time namespace, a simulated one.
        self.is_shared = bool(host) and host == self._host and abs(best.offset_s) <= best.error_s
        self._samples.append(best)

    def offset(self, now: float) -> Offset:
        """Return the offset at our time ``now``, also of a past one. Raises IndexError before the first answer."""
        if self.is_shared:
            return Offset()
        newest = self._samples[-1]
        low, high = _bounds(newest, now)
        for sample in self._samples:
            other_low, other_high = _bounds(sample, now)
            if max(low, other_low) > min(high, other_high):
                continue  # It was set meanwhile, or drifts more than any should: what it said last counts.
            low, high = max(low, other_low), min(high, other_high)
        return Offset((low + high) / 2, (high - low) / 2)


def _bounds(sample: Sample, now: float) -> tuple[float, float]:
    margin = sample.error_s + DRIFT * abs(now - sample.time)
    return sample.offset_s - margin, sample.offset_s + margin


async def measure(node: Node, tracer: Address, clock: NodeClock, *, num_asks: int = NUM_ASKS) -> Moment:
    """Ask a node's tracer for the time, and have ``clock`` take the answers; return the last. Raises BusError."""
    assert tracer.actor == TRACER
    ref, samples = node.ref(tracer), []
    while True:
        asked = node.clock.now()
        moment = await ref.ask(GetMoment(), timeout=ASK_S)
        samples.append(Sample(asked, node.clock.now(), moment.now))
        if len(samples) >= num_asks:
            clock.take(samples, moment.host)
            return moment
