"""The books of a block manager under any sequence of operations."""

import itertools

from block_managers import fill, make
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from callboard.bus import UnknownActor
from callboard.kv.layout import BadRange, OutOfBlocks, StaleReservation
from callboard.kv.reservation import State
from callboard.kv.tokens import num_tokens, pack_tokens

texts = st.lists(st.integers(0, 1), min_size=1, max_size=11).map(pack_tokens)
engines = st.sampled_from(["e", "f"])
pick = st.integers(0, 9)


class Life(RuleBasedStateMachine):
    """Engines, senders and time do what they like; the books must always balance."""

    def __init__(self):
        super().__init__()
        self.manager = make(num_blocks=14)
        self.manager.attach("f", "f-1")
        self.now = 0.0
        self.names = map(str, itertools.count())
        self.sequences = {}
        self.slabs = {"e": [], "f": []}
        self.held = []
        self.writes = []
        self.loans = []

    def alone(self, blocks):
        """Check that freshly lent blocks are nobody else's."""
        blocks = list(blocks)
        for _, table in self.sequences.values():
            assert not set(table) & set(blocks)
        for slab in self.slabs.values():
            assert not set(slab) & set(blocks)
        for held in self.held:
            if not held.reservation.is_over:
                assert not set(held.block_table) & set(blocks)
        for loan in self.loans:
            assert not set(loan.block_table) & set(blocks)
        assert all(block not in self.manager.cache for block in blocks)

    @rule(engine=engines, tokens=texts)
    def admit(self, engine, tokens):
        name = next(self.names)
        try:
            grant = self.manager.admit(engine, name, tokens)
        except (OutOfBlocks, UnknownActor):
            return
        self.alone(grant.block_table[grant.num_cached_tokens // 2 :])
        self.sequences[engine, name] = (tokens, list(grant.block_table))

    @rule(engine=engines, count=st.integers(0, 5))
    def refill(self, engine, count):
        try:
            blocks = self.manager.refill(engine, count)
        except UnknownActor:
            return
        self.alone(blocks)
        self.slabs[engine] += blocks

    @rule(engine=engines, count=st.integers(0, 3))
    def give(self, engine, count):
        blocks = [self.slabs[engine].pop() for _ in range(min(count, len(self.slabs[engine])))]
        self.manager.give(engine, blocks)

    @precondition(lambda self: self.sequences)
    @rule(number=pick, more=texts, is_over=st.booleans())
    def grow_and_seal(self, number, more, is_over):
        (engine, name), (tokens, table) = list(self.sequences.items())[number % len(self.sequences)]
        tokens += more
        while len(table) * 2 < num_tokens(tokens) and self.slabs[engine]:
            table.append(self.slabs[engine].pop())
        tokens = tokens[: len(table) * 2 * 4]
        self.sequences[engine, name] = (tokens, table)
        self.manager.seal(engine, name, tokens, table)
        if is_over:
            self.manager.finish(engine, name, tokens, table)
            del self.sequences[engine, name]

    @rule(tokens=texts, number=st.integers(0, 11))
    def reserve(self, tokens, number):
        end = min(number, num_tokens(tokens))
        try:
            held = self.manager.reservations.reserve((next(self.names), 0), tokens, end, now=self.now)
        except OutOfBlocks:
            return
        self.alone(held.block_table[held.num_cached_tokens // 2 :])
        self.held.append(held)

    @precondition(lambda self: self.held)
    @rule(number=pick, begin=pick, length=st.integers(1, 11), writer=st.sampled_from(["p", "q"]))
    def open_write(self, number, begin, length, writer):
        reservation = self.held[number % len(self.held)].reservation
        first = reservation.begin + begin
        name = next(self.names)
        try:
            self.manager.reservations.open_write(
                reservation.id, name, begin=first, end=min(first + length, reservation.end), writer=writer, now=self.now
            )
        except (BadRange, StaleReservation):
            return
        self.writes.append((reservation.id, name))

    @precondition(lambda self: self.writes)
    @rule(number=pick, is_complete=st.booleans())
    def close_write(self, number, is_complete):
        reservation_id, name = self.writes.pop(number % len(self.writes))
        try:
            self.manager.reservations.close_write(reservation_id, name, is_complete=is_complete, now=self.now)
        except StaleReservation:
            assert is_complete

    @precondition(lambda self: self.held)
    @rule(number=pick)
    def write_the_rest(self, number):
        reservation = self.held[number % len(self.held)].reservation
        if reservation.state is State.RESERVED and not reservation.written:
            fill(self.manager, self.held[number % len(self.held)])

    @precondition(lambda self: self.held)
    @rule(number=pick, engine=engines)
    def adopt(self, number, engine):
        held = self.held[number % len(self.held)]
        name = next(self.names)
        try:
            grant = self.manager.adopt(engine, name, held.prompt, held.reservation.id)
        except (OutOfBlocks, StaleReservation, UnknownActor):
            return
        self.held.remove(held)
        self.sequences[engine, name] = (held.prompt, list(grant.block_table))

    @precondition(lambda self: self.held)
    @rule(number=pick)
    def release(self, number):
        self.manager.reservations.release(self.held[number % len(self.held)].reservation.id)

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def wait(self, seconds):
        self.now += seconds
        before = {held.reservation.id for held in self.held if held.reservation.writes}
        self.manager.reservations.expire(self.now)
        assert not [held for held in self.held if held.reservation.id in before and held.reservation.is_over]

    @rule(writer=st.sampled_from(["p", "q"]), is_dead=st.booleans())
    def writer_leaves(self, writer, is_dead):
        self.manager.reservations.tie(writer)
        self.manager.reservations.untie(writer, is_dead=is_dead)

    @rule(engine=engines, tokens=texts, number=st.integers(1, 11))
    def lend(self, engine, tokens, number):
        try:
            loan = self.manager.lend(engine, tokens, min(number, num_tokens(tokens)))
        except (OutOfBlocks, UnknownActor):
            return
        self.loans.append(loan)

    @precondition(lambda self: self.loans)
    @rule(number=pick, is_computed=st.booleans())
    def end_loan(self, number, is_computed):
        loan = self.loans.pop(number % len(self.loans))
        if is_computed:
            self.manager.has_computed(loan)
        self.manager.end_loan(loan)

    @rule(engine=engines, is_known=st.booleans())
    def engine_goes(self, engine, is_known):
        try:
            self.manager.detach(self.manager.account(engine), is_known=is_known)
        except UnknownActor:
            return
        if is_known:
            self.forget(engine)

    @rule(engine=engines)
    def engine_comes(self, engine):
        self.manager.attach(engine, next(self.names))
        self.forget(engine)

    def forget(self, engine):
        self.slabs[engine] = []
        self.sequences = {key: value for key, value in self.sequences.items() if key[0] != engine}
        self.loans = [loan for loan in self.loans if loan.engine != engine]

    @invariant()
    def books_balance(self):
        assert self.manager.check_integrity() == []

    def teardown(self):
        reservations = self.manager.reservations
        for reservation_id, name in self.writes:
            reservations.close_write(reservation_id, name, is_complete=False, now=self.now)
        for held in self.held:
            reservations.release(held.reservation.id)
        for loan in self.loans:
            self.manager.end_loan(loan)
        for engine in ("e", "f"):
            self.manager.detach(self.manager.attach(engine, "last"), is_known=True)
        counts = self.manager.counts()
        assert counts.free + counts.cached == counts.num_blocks
        assert self.manager.check_integrity() == []


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
