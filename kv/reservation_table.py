"""The reservations of a pool, with their blocks: made, written, sealed into the prefix cache, and ended."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from .allocator import Allocator
from .layout import BadRange, OutOfBlocks, StaleReservation
from .reservation import Reservation, State
from .slots import resolve_range
from .tokens import TOKEN_BYTES, num_tokens

Key = tuple[str | int, ...]
"""Who asked for a reservation, and for what: a repeat has the same one."""


@dataclass(slots=True, eq=False)
class Held:
    """A reservation with its blocks: those of ``[0, num_cached_tokens)`` are pinned in the cache, the rest are new.

    The table covers all of ``prompt``, also what lies past the reservation's end: were those blocks asked for only
    when the reservation is adopted, requests that each hold a part of the pool could wait for each other for ever.
    """

    key: Key
    reservation: Reservation
    prompt: bytes
    block_table: tuple[int, ...]
    num_cached_tokens: int
    num_claims: int = 0
    """How often it was asked for: who takes that back must not release it under the others."""
    grafts: dict[str, dict[int, int]] = field(default_factory=dict)
    """Blocks held for an open write, by their index in the table: they replace the table's when it is complete."""

    def exchange(self, grafts: Mapping[int, int]) -> list[int]:
        """Put grafted blocks into the table; return those that were in their places."""
        table = list(self.block_table)
        for index, block in grafts.items():
            table[index] = block
        replaced = [self.block_table[index] for index in grafts]
        self.block_table = tuple(table)
        return replaced

    def all_blocks(self) -> list[int]:
        """Return every block held, once for each time it is held."""
        return [*self.block_table, *(block for grafts in self.grafts.values() for block in grafts.values())]


UNFILLED_SHARE = 0.5
"""The most of a pool that reservations with KV still to come may hold, unless there is only one of them.

Each of them waits for an engine, which may need blocks of this very pool to compute what was promised: if they held
all of it, or those of two pools that send to each other did, everybody would wait for everybody.
"""


class ReservationTable:
    """All reservations that still have a claim to blocks. Times are seconds of the caller's clock."""

    def __init__(self, allocator: Allocator, *, lease_s: float, new_id: Callable[[], str]) -> None:
        self.lease_s = lease_s
        self._allocator = allocator
        self._new_id = new_id
        self._held: dict[str, Held] = {}
        self._by_key: dict[Key, str] = {}
        self._awaited: dict[str, int] = {}
        self._tied: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    def get(self, reservation_id: str) -> Held:
        """Return a reservation that has not ended. Raises StaleReservation."""
        held = self._held.get(reservation_id)
        if held is None:
            raise StaleReservation(reservation_id=reservation_id, reason="it has ended, or never was")
        return held

    def is_settled(self, reservation_id: str) -> bool:
        """Return whether nothing is left to arrive for a reservation: it is sealed, or has ended."""
        held = self._held.get(reservation_id)
        return held is None or held.reservation.state not in (State.RESERVED, State.WRITING)

    def renew(self, key: Key, prompt: bytes, end: int | None, *, now: float) -> Held | None:
        """Renew the lease of a live ``key`` and return what it holds; None if there is none. Raises BadRange."""
        _, last = resolve_range(0, end, num_tokens(prompt))
        repeated = self._by_key.get(key)
        if repeated is None or not self._held[repeated].reservation.is_open:
            return None
        held = self._held[repeated]
        if held.prompt != prompt or held.reservation.end != last:
            raise BadRange(begin=0, end=last, num_tokens=num_tokens(prompt), reason="it was another at first")
        held.reservation.expires_at = now + self.lease_s
        held.num_claims += 1
        return held

    def reserve(self, key: Key, prompt: bytes, end: int | None, *, now: float) -> Held:
        """Reserve room for what ``prompt[:end]`` lacks. A repeat of a live ``key`` renews the lease.

        Raises OutOfBlocks, BadRange.
        """
        if (live := self.renew(key, prompt, end, now=now)) is not None:
            return live
        _, last = resolve_range(0, end, num_tokens(prompt))
        match = self._allocator.cache.match(prompt)
        total = self._allocator.blocks_for(num_tokens(prompt))
        if match.num_tokens < last:
            self._require_share(total)
        table = self._allocator.take(match.blocks, total)
        self._allocator.cache.note_query(num_tokens(prompt), match.num_tokens)
        reservation = Reservation(
            self._new_id(), begin=min(match.num_tokens, last), end=last, expires_at=now + self.lease_s
        )
        held = Held(key, reservation, prompt, table, match.num_tokens, num_claims=1)
        self._held[reservation.id] = held
        self._by_key[key] = reservation.id
        return held

    def open_write(
        self, reservation_id: str, write_id: str, *, begin: int, end: int, writer: str | None, now: float
    ) -> None:
        """Let a writer in; renews the lease. Raises StaleReservation, BadRange."""
        reservation = self.get(reservation_id).reservation
        reservation.open_write(write_id, begin=begin, end=end, writer=writer)
        reservation.expires_at = now + self.lease_s

    def close_write(self, reservation_id: str, write_id: str, *, is_complete: bool, now: float) -> None:
        """End a write; seal when all is in place. Renews the lease.

        Raises StaleReservation (and ends the write) if it was complete but too late.
        """
        held = self._held.get(reservation_id)
        if held is None:
            return
        was_sealed = held.reservation.state is State.SEALED
        grafts = held.grafts.pop(write_id, {})
        given_up = list(grafts.values())
        try:
            held.reservation.close_write(write_id, is_complete=is_complete)
            if is_complete:
                given_up = held.exchange(grafts)
        finally:
            self._allocator.cache.unpin(given_up)
            held.reservation.expires_at = now + self.lease_s
            self._settle(held, was_sealed=was_sealed)

    def graft(self, held: Held, write_id: str, blocks: Mapping[int, int]) -> None:
        """Have an open write bring these blocks, by their index in the table, in place of writing into the table's.

        Takes one hold of each over. What they replace is given back when the write is complete: should it fail,
        another may be let in there, and must not write into blocks that are shared.
        """
        assert write_id in held.reservation.writes
        assert write_id not in held.grafts
        held.grafts[write_id] = dict(blocks)

    def release(self, reservation_id: str) -> None:
        """Give a reservation up; what was sealed stays cached. A repeat does nothing."""
        held = self._held.get(reservation_id)
        if held is not None:
            held.reservation.release()
            self._settle(held)

    def disclaim(self, reservation_id: str) -> None:
        """Take one ``reserve`` or ``renew`` back, of which nobody has heard; the last one gives the blocks back."""
        held = self._held.get(reservation_id)
        if held is not None:
            held.num_claims -= 1
            if not held.num_claims:
                self.release(reservation_id)

    def tie(self, writer: str) -> None:
        """Note that a writer's process is heard of: while it is, its writes renew their leases."""
        self._tied[writer] = self._tied.get(writer, 0) + 1

    def untie(self, writer: str, *, is_dead: bool) -> None:
        """Note that one tie of a writer broke; if it was the last, and the process is gone, end its writes."""
        self._tied[writer] -= 1
        if not self._tied[writer]:
            del self._tied[writer]
            if is_dead:
                self.writer_died(writer)

    def is_tied(self, writer: str) -> bool:
        """Return whether a writer's process is heard of."""
        return writer in self._tied

    def is_written_by(self, writer: str) -> bool:
        """Return whether a write of this process is open."""
        return any(write.writer == writer for held in self._held.values() for write in held.reservation.writes.values())

    def quarantined_by(self) -> dict[str, int]:
        """Return how many blocks each writer keeps in quarantine; those of several count for each."""
        found: dict[str, int] = {}
        for held in self._held.values():
            if held.reservation.state is State.QUARANTINED:
                # In order: a set of strings has another one in every process.
                for writer in dict.fromkeys(write.writer for write in held.reservation.writes.values()):
                    if writer is not None:
                        found[writer] = found.get(writer, 0) + len(held.block_table)
        return found

    def writer_died(self, writer: str) -> None:
        """End all writes of a process that is proven dead."""
        for held in list(self._held.values()):
            held.reservation.writer_died(writer)
            self._settle(held)

    def await_seal(self, reservation_id: str) -> None:
        """Note that somebody with a deadline waits for a reservation: it does not expire meanwhile."""
        self._awaited[reservation_id] = self._awaited.get(reservation_id, 0) + 1

    def end_await(self, reservation_id: str, *, now: float) -> None:
        """Undo one ``await_seal``; the lease begins anew."""
        self._awaited[reservation_id] -= 1
        if not self._awaited[reservation_id]:
            del self._awaited[reservation_id]
        if reservation_id in self._held:
            self._held[reservation_id].reservation.expires_at = now + self.lease_s

    def expire(self, now: float) -> None:
        """End the leases that are over by now."""
        for held in list(self._held.values()):
            reservation = held.reservation
            if not reservation.is_open or reservation.expires_at > now:
                continue
            writers = [write.writer for write in reservation.writes.values()]
            if reservation.id in self._awaited or (writers and all(writer in self._tied for writer in writers)):
                reservation.expires_at = now + self.lease_s
                continue
            reservation.expire()
            self._settle(held)

    def next_expiry(self) -> float | None:
        """Return when ``expire`` should be called next, None if nothing can expire."""
        return min((h.reservation.expires_at for h in self._held.values() if h.reservation.is_open), default=None)

    def take(self, held: Held) -> None:
        """End a sealed reservation without giving its blocks back: the caller has them now. Raises StaleReservation."""
        held.reservation.adopt()
        self._forget(held)

    def blocks(self, *, is_quarantined: bool) -> list[int]:
        """Return the blocks of the reservations in quarantine, or of all others, once for each hold."""
        return [
            block
            for held in self._held.values()
            if (held.reservation.state is State.QUARANTINED) == is_quarantined
            for block in held.all_blocks()
        ]

    def check_integrity(self) -> list[str]:
        """Return what is wrong: nothing, unless there is a bug."""
        problems = [f"key {key} is of no reservation" for key, i in self._by_key.items() if i not in self._held]
        for held in self._held.values():
            if held.reservation.is_over:
                problems.append(f"{held.reservation.id} is over, but held")
            problems += [
                f"block {block} of {held.reservation.id} may be written, and is somebody else's too"
                for block in self._unfinished(held)
                if self._allocator.pool.refs(block) != 1 or block in self._allocator.cache
            ]
        return problems

    def _unfinished(self, held: Held) -> Iterator[int]:
        """Give the blocks into which a writer, or the engine that adopts, may yet write."""
        size = self._allocator.block_size
        in_place = [(0, held.num_cached_tokens), *held.reservation.written]
        for index, block in enumerate(held.block_table):
            first = index * size
            if not any(begin <= first and first + size <= end for begin, end in in_place):
                yield block

    def _require_share(self, total: int) -> None:
        """Raise OutOfBlocks if reservations with KV still to come would hold too much of the pool."""
        unfilled = sum(len(held.block_table) for i, held in self._held.items() if not self.is_settled(i))
        most = int(UNFILLED_SHARE * self._allocator.pool.num_blocks)
        if unfilled and unfilled + total > most:
            raise OutOfBlocks(needed=total, free=max(0, most - unfilled))

    def _settle(self, held: Held, *, was_sealed: bool = True) -> None:
        """Do what a reservation's new state asks for: cache what was sealed, give back what is over."""
        reservation = held.reservation
        for write_id in [write_id for write_id in held.grafts if write_id not in reservation.writes]:
            self._allocator.cache.unpin(list(held.grafts.pop(write_id).values()))
        if reservation.state is State.SEALED and not was_sealed:
            self._allocator.cache.insert(held.prompt[: reservation.end * TOKEN_BYTES], held.block_table)
        if reservation.is_over and held.reservation.id in self._held:
            self._forget(held)
            self._allocator.cache.unpin(held.block_table)

    def _forget(self, held: Held) -> None:
        del self._held[held.reservation.id]
        if self._by_key.get(held.key) == held.reservation.id:
            del self._by_key[held.key]
