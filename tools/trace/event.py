"""A node's record as a reader has it: with where it was made, and its times on the reader's clock."""

from dataclasses import dataclass

from callboard.bus.taps import TapRecord


@dataclass(frozen=True, slots=True)
class Event:
    """A record, and where it was made. Times are seconds on the reader's monotonic clock, 0 where the record has 0."""

    node: str
    record: TapRecord
    time: float
    begin: float
    first: float
    error_s: float = 0.0
    """The node's clock is known to plus or minus this; 0 on the reader's own host."""
    wall: float = 0.0
    """Seconds since 1970 at ``time``."""


def event_of(
    record: TapRecord, node: str, *, offset_s: float = 0.0, error_s: float = 0.0, wall_s: float = 0.0
) -> Event:
    """Return a record on the reader's clock.

    ``offset_s`` is what the reader's clock is ahead of the node's, ``wall_s`` what the time of day is ahead of that.
    """
    return Event(
        node,
        record,
        record.time + offset_s,
        record.begin + offset_s if record.begin else 0.0,
        record.first + offset_s if record.first else 0.0,
        error_s,
        record.time + offset_s + wall_s,
    )
