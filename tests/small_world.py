"""The ownership of a very small pool, with everybody who may write into it: states, events, and what must hold.

The books (kv/block_manager.py) are the production ones. Around them, a plain model of what really happens: which slots
each writer may still write, whatever the books say of it, and what each slot holds.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from callboard.bus import Refusal
from callboard.kv.block_manager import BlockManager, Loan
from callboard.kv.tokens import pack_tokens

SIZE = 2
"""Slots of a block."""
Event = tuple[str, ...]
Slot = int


@dataclass(frozen=True)
class Asked:
    """A reservation that may be asked for: ``writes`` are (writer, begin, end), each tried ``num_tries`` times."""

    prompt: tuple[int, ...]
    end: int
    writes: tuple[tuple[str, int, int], ...]
    num_tries: int = 1
    most: int = 1
    """How often it is asked for after it has ended."""


@dataclass(frozen=True)
class Scope:
    """What may happen. ``others``: kinds of events beyond those of reservations and writes."""

    asked: dict[str, Asked]
    num_blocks: int = 3
    others: frozenset[str] = frozenset()
    lent: tuple[int, ...] = ()
    """The prompt of the one loan at a time, of which there are ``num_loans``; all of it, or ``lent_end`` tokens."""
    lent_end: int = 0
    num_loans: int = 0


@dataclass
class Writing:
    """One write as its writer sees it: ``slots`` it may write, until it says that it will not any more."""

    writer: str
    reservation_id: str
    begin: int
    end: int
    status: str = "unasked"
    slots: frozenset[Slot] = frozenset()
    is_grafted: bool = False


@dataclass
class Made:
    """A reservation that was made, by its number."""

    name: str
    reservation_id: str
    writes: dict[str, Writing] = field(default_factory=dict)


class World:
    """One state. ``apply`` changes it; make another from the same scope and apply the same events to copy it."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        ids = map(str, itertools.count())
        self.manager = BlockManager(scope.num_blocks, SIZE, lease_s=1.0, new_id=lambda: next(ids))
        self.manager.allocator.pool.watch = self
        self.problems: list[str] = []
        self.now = 0.0
        self.made: list[Made] = []
        self.dead: set[str] = set()
        self.tied: set[str] = set()
        self.awaited: set[str] = set()
        self.holds: dict[Slot, tuple[int, ...]] = {}
        self.engine_writes: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {}
        """Sequences of the engine: tokens, table, and from which token on it may write."""
        self.loan: Loan | None = None
        self.num_loans = 0
        self.manager.attach("e", "1")

    # ---- the pool's watch ----------------------------------------------------------------------------------------

    def freed(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            for slot in range(block * SIZE, block * SIZE + SIZE):
                self.holds.pop(slot, None)

    def taken(self, blocks: Iterable[int]) -> None:
        pass

    # ---- events --------------------------------------------------------------------------------------------------

    def events(self) -> Iterator[Event]:
        """Give what may happen now, including what is said twice and what comes too late."""
        scope, others = self.scope, self.scope.others
        for name, asked in scope.asked.items():
            if sum(made.name == name for made in self.made) < asked.most or self._is_live(name):
                yield ("reserve", name)
        for number, made in enumerate(self.made):
            yield ("release", str(number))
            if "adopt" in others and self.is_held(made):
                yield ("adopt", str(number))
            if "await" in others and self.is_held(made):
                yield ("unawait" if made.reservation_id in self.awaited else "await", str(number))
            for write_id, writing in made.writes.items():
                if writing.writer in self.dead:
                    continue
                yield ("open", str(number), write_id)
                if not self.is_held(made):
                    continue
                if writing.status in ("unasked", "let in", "aborted"):
                    yield ("abort", str(number), write_id)
                if writing.status in ("let in", "completed") and (writing.writer != "self" or writing.is_grafted):
                    yield ("complete", str(number), write_id)
                if writing.writer == "self" and writing.status == "let in" and not writing.is_grafted and self._is_lent:
                    yield ("graft", str(number), write_id)
        yield ("expire",)
        for writer in ("p", "q"):
            if "die" in others and writer not in self.dead:
                yield ("die", writer)
            if "tie" in others and writer not in self.dead:
                yield ("untie" if writer in self.tied else "tie", writer)
        for sequence_id in self.engine_writes:
            if sequence_id.startswith("s"):
                yield ("finish", sequence_id)
        if self.loan is None:
            if self.num_loans < scope.num_loans:
                yield ("lend",)
        else:
            yield ("end loan",)
            if self.loan.loan_id in self.engine_writes:
                yield ("computed",)
        if "engine" in others:
            if "e" in self.manager._engines:
                yield ("engine leaves",)
                yield ("engine is lost",)
            yield ("engine returns",)

    def apply(self, event: Event) -> bool:
        """Let it happen; return whether it was refused."""
        kind, *arguments = event
        try:
            getattr(self, "_on_" + kind.replace(" ", "_"))(*arguments)
        except Refusal:
            return True
        return False

    def _on_reserve(self, name: str) -> None:
        asked = self.scope.asked[name]
        held = self.manager.reservations.reserve((name,), pack_tokens(asked.prompt), asked.end, now=self.now)
        if any(made.reservation_id == held.reservation.id for made in self.made):
            return
        made = Made(name, held.reservation.id)
        for writer, begin, end in asked.writes:
            begin = max(begin, held.reservation.begin)
            for attempt in range(asked.num_tries):
                if begin < end:
                    made.writes[f"{writer}{attempt}"] = Writing(writer, made.reservation_id, begin, end)
        self.made.append(made)

    def _on_open(self, number: str, write_id: str) -> None:
        made = self.made[int(number)]
        writing = made.writes[write_id]
        self.manager.reservations.open_write(
            made.reservation_id,
            number + write_id,
            begin=writing.begin,
            end=writing.end,
            writer=writing.writer,
            now=self.now,
        )
        if writing.status == "unasked":
            table = self.manager.reservations.get(made.reservation_id).block_table
            writing.status, writing.slots = "let in", slots_of(table, writing.begin, writing.end)
            self._spoil(writing.slots)
        elif writing.status != "let in":
            self.problems.append(f"write {write_id} of {number} was let in after it had been {writing.status}")

    def _on_abort(self, number: str, write_id: str) -> None:
        self._close(number, write_id, "aborted")

    def _on_complete(self, number: str, write_id: str) -> None:
        writing = self.made[int(number)].writes[write_id]
        prompt = self.scope.asked[self.made[int(number)].name].prompt
        if writing.status == "let in" and not writing.is_grafted:
            table = self.manager.reservations.get(writing.reservation_id).block_table
            self._fill(prompt, table, writing.begin, writing.end)
        self._close(number, write_id, "completed")

    def _close(self, number: str, write_id: str, status: str) -> None:
        writing = self.made[int(number)].writes[write_id]
        writing.status, writing.slots = status, frozenset()  # It writes no more, and then says so.
        self.manager.reservations.close_write(
            writing.reservation_id, number + write_id, is_complete=status == "completed", now=self.now
        )

    def _on_release(self, number: str) -> None:
        self.manager.reservations.release(self.made[int(number)].reservation_id)

    def _on_expire(self) -> None:
        self.now += 10.0
        self.manager.reservations.expire(self.now)

    def _on_die(self, writer: str) -> None:
        self.dead.add(writer)
        for made in self.made:
            for writing in made.writes.values():
                if writing.writer == writer:
                    writing.status, writing.slots = "aborted", frozenset()
        if writer in self.tied:
            self.tied.remove(writer)
            self.manager.reservations.untie(writer, is_dead=True)
        else:
            self.manager.reservations.writer_died(writer)

    def _on_tie(self, writer: str) -> None:
        self.tied.add(writer)
        self.manager.reservations.tie(writer)

    def _on_untie(self, writer: str) -> None:
        self.tied.remove(writer)
        self.manager.reservations.untie(writer, is_dead=False)

    def _on_await(self, number: str) -> None:
        self.awaited.add(self.made[int(number)].reservation_id)
        self.manager.reservations.await_seal(self.made[int(number)].reservation_id)

    def _on_unawait(self, number: str) -> None:
        self.awaited.remove(self.made[int(number)].reservation_id)
        self.manager.reservations.end_await(self.made[int(number)].reservation_id, now=self.now)

    def _on_adopt(self, number: str) -> None:
        prompt = self.scope.asked[self.made[int(number)].name].prompt
        sequence_id = f"s{number}"
        grant = self.manager.adopt("e", sequence_id, pack_tokens(prompt), self.made[int(number)].reservation_id)
        if not self.has_kv(prompt, grant.block_table, grant.num_cached_tokens):
            self.problems.append(f"{sequence_id} was given KV that never arrived")
        self.engine_writes[sequence_id] = (prompt, grant.block_table, grant.num_cached_tokens)
        self._spoil(self._engine_slots(sequence_id))

    def _on_finish(self, sequence_id: str) -> None:
        tokens, table, begin = self.engine_writes.pop(sequence_id)
        self._fill(tokens, table, begin, len(tokens))
        self.manager.finish("e", sequence_id, pack_tokens(tokens), table)

    def _on_lend(self) -> None:
        prompt = self.scope.lent
        end = self.scope.lent_end or len(prompt)
        self.loan = self.manager.lend("e", pack_tokens(prompt), end)
        self.num_loans += 1
        if self.loan.engine is not None:
            self.engine_writes[self.loan.loan_id] = (prompt[:end], self.loan.block_table, self.loan.num_cached_tokens)
            self._spoil(self._engine_slots(self.loan.loan_id))

    def _on_computed(self) -> None:
        assert self.loan is not None
        tokens, table, begin = self.engine_writes.pop(self.loan.loan_id)
        self._fill(tokens, table, begin, len(tokens))
        self.manager.has_computed(self.loan)

    def _on_end_loan(self) -> None:
        assert self.loan is not None
        self.engine_writes.pop(self.loan.loan_id, None)  # It was aborted, and has said so.
        self.manager.end_loan(self.loan)
        self.loan = None

    def _on_graft(self, number: str, write_id: str) -> None:
        made = self.made[int(number)]
        writing = made.writes[write_id]
        assert self.loan is not None
        table = self.manager.reservations.get(made.reservation_id).block_table
        left = self.manager.graft(self.loan, made.reservation_id, number + write_id)
        writing.is_grafted = True
        writing.slots = frozenset().union(*(slots_of(table, *each) for each in left))
        for begin, end in left:
            for position in range(begin, end):
                self.holds[slot_of(table, position)] = self.holds[slot_of(self.loan.block_table, position)]

    def _on_engine_leaves(self) -> None:
        self._engine_lets_go()
        self.manager.detach(self.manager.account("e"), is_known=True)

    def _on_engine_is_lost(self) -> None:
        self.manager.detach(self.manager.account("e"), is_known=False)

    def _on_engine_returns(self) -> None:
        self._engine_lets_go()
        self.manager.attach("e", "2")

    def _engine_lets_go(self) -> None:
        self.engine_writes.clear()
        if self.loan is not None and self.loan.loan_id not in self.manager._loans:
            self.loan = None

    # ---- what is so ----------------------------------------------------------------------------------------------

    def writers(self) -> Iterator[tuple[str, frozenset[Slot]]]:
        """Give who may write which slots now."""
        for made in self.made:
            for write_id, writing in made.writes.items():
                if writing.slots:
                    yield f"write {write_id} of {made.name}", writing.slots
        for sequence_id in self.engine_writes:
            yield sequence_id, self._engine_slots(sequence_id)

    @property
    def is_over(self) -> bool:
        """Whether everything is back."""
        counts = self.manager.counts()
        return counts.free + counts.cached == counts.num_blocks and not counts.num_reservations

    @property
    def _is_lent(self) -> bool:
        return self.loan is not None and self.manager._loans.get(self.loan.loan_id) == self.loan.block_table

    def is_held(self, made: Made) -> bool:
        return made.reservation_id in self.manager.reservations._held

    def _is_live(self, name: str) -> bool:
        held = [
            self.manager.reservations.get(m.reservation_id) for m in self.made if m.name == name and self.is_held(m)
        ]
        return any(each.reservation.is_open for each in held)

    def _engine_slots(self, sequence_id: str) -> frozenset[Slot]:
        _, table, begin = self.engine_writes[sequence_id]
        return slots_of(table, begin, len(table) * SIZE)

    def _spoil(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            self.holds.pop(slot, None)

    def _fill(self, tokens: tuple[int, ...], table: tuple[int, ...], begin: int, end: int) -> None:
        for position in range(begin, end):
            self.holds[slot_of(table, position)] = tokens[: position + 1]

    def has_kv(self, tokens: tuple[int, ...], table: tuple[int, ...], end: int, begin: int = 0) -> bool:
        return all(self.holds.get(slot_of(table, i)) == tokens[: i + 1] for i in range(begin, end))


def slot_of(table: tuple[int, ...], position: int) -> Slot:
    return table[position // SIZE] * SIZE + position % SIZE


def slots_of(table: tuple[int, ...], begin: int, end: int) -> frozenset[Slot]:
    return frozenset(slot_of(table, position) for position in range(begin, end))
