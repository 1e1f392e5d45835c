"""The life of a reservation, without its blocks: who may write which tokens, and when that is over.

    reserved <-> writing -> sealed -> adopted
        |           |          |
        |           v          v
        |      quarantined   released | expired
        v           |
    released | expired (from quarantined: when the last writer has closed, or is proven dead)

Time never ends a write. Whoever lets a reservation go while it is being written puts it into quarantine, because a
writer that was merely stopped wakes up and writes on.
"""

import enum
from dataclasses import dataclass

from .layout import BadRange, StaleReservation


class State(enum.StrEnum):
    """Where a reservation is in its life."""

    RESERVED = "reserved"
    WRITING = "writing"
    SEALED = "sealed"
    QUARANTINED = "quarantined"
    ADOPTED = "adopted"
    RELEASED = "released"
    EXPIRED = "expired"


_OVER = (State.ADOPTED, State.RELEASED, State.EXPIRED)


@dataclass(frozen=True, slots=True)
class Write:
    """A write under way: ``[begin, end)`` in tokens of the prompt. ``writer`` is its process, if known."""

    begin: int
    end: int
    writer: str | None


class Reservation:
    """Room for the tokens ``[begin, end)``, under a lease. An empty one is sealed from the start."""

    def __init__(self, reservation_id: str, *, begin: int, end: int, expires_at: float) -> None:
        self.id = reservation_id
        self.begin = begin
        self.end = end
        self.expires_at = expires_at
        self.state = State.SEALED if begin == end else State.RESERVED
        self.writes: dict[str, Write] = {}
        self.written: list[tuple[int, int]] = []
        """What is in place: disjoint ranges, ascending, none adjacent."""
        self._closed: dict[str, bool] = {}
        """The writes that are over, and whether they were complete."""
        self._left_as = State.RELEASED

    @property
    def is_open(self) -> bool:
        """Whether it may still be written or adopted."""
        return self.state in (State.RESERVED, State.WRITING, State.SEALED)

    @property
    def is_over(self) -> bool:
        """Whether it has no claim to its blocks any more."""
        return self.state in _OVER

    def open_write(self, write_id: str, *, begin: int, end: int, writer: str | None) -> None:
        """Let a writer into ``[begin, end)``, where no other is or was. A repeat does nothing.

        Raises StaleReservation, BadRange.
        """
        self.require_open()
        if write_id in self._closed:
            # The two came over different links: let in now, the writer would never be heard of again.
            raise StaleReservation(reservation_id=self.id, reason="this write has been closed already")
        if write_id in self.writes:
            return
        if not self.begin <= begin < end <= self.end:
            raise BadRange(begin=begin, end=end, num_tokens=self.end, reason="it is not inside the reservation")
        others = [(write.begin, write.end) for write in self.writes.values()]
        for first, last in (*others, *self.written):
            if begin < last and first < end:
                raise BadRange(begin=begin, end=end, num_tokens=self.end, reason="another write covers part of it")
        self.writes[write_id] = Write(begin, end, writer)
        self.state = State.WRITING

    def close_write(self, write_id: str, *, is_complete: bool) -> None:
        """End a write; all of its range is in place if ``is_complete``. A repeat does nothing.

        Raises StaleReservation if the write was complete but came too late to be of use; it is closed all the same.
        """
        was_complete = self._closed.setdefault(write_id, is_complete)
        write = self.writes.pop(write_id, None)
        if write is None:
            if is_complete and not was_complete:
                raise StaleReservation(reservation_id=self.id, reason="this write has been ended for its writer")
            return
        if self.state is State.QUARANTINED:
            if not self.writes:
                self.state = self._left_as
            if is_complete:
                raise StaleReservation(reservation_id=self.id, reason="it was given up while it was written")
            return
        if is_complete:
            self._add_written(write.begin, write.end)
        if not self.writes:
            self.state = State.SEALED if self.written == [(self.begin, self.end)] else State.RESERVED

    def writer_died(self, writer: str) -> None:
        """End every write of a process that is proven dead."""
        for write_id in [i for i, write in self.writes.items() if write.writer == writer]:
            self.close_write(write_id, is_complete=False)

    def adopt(self) -> None:
        """Pass the blocks to a sequence. Raises StaleReservation unless it is sealed."""
        if self.state is not State.SEALED:
            raise StaleReservation(reservation_id=self.id, reason=f"it is {self.state}")
        self.state = State.ADOPTED

    def release(self) -> None:
        """Give the reservation up. A repeat does nothing."""
        self._leave(State.RELEASED)

    def expire(self) -> None:
        """End the lease."""
        self._leave(State.EXPIRED)

    def require_open(self) -> None:
        """Raise StaleReservation unless it may still be written or adopted."""
        if not self.is_open:
            raise StaleReservation(reservation_id=self.id, reason=f"it is {self.state}")

    def _leave(self, state: State) -> None:
        if not self.is_open:
            return
        self._left_as = state
        self.state = State.QUARANTINED if self.writes else state

    def _add_written(self, begin: int, end: int) -> None:
        ranges: list[tuple[int, int]] = []
        for first, last in sorted([*self.written, (begin, end)]):
            if ranges and ranges[-1][1] == first:
                ranges[-1] = (ranges[-1][0], last)
            else:
                ranges.append((first, last))
        self.written = ranges
