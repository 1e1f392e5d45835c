import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from callboard.bus import UnknownActor
from callboard.kv.block_manager import BlockManager
from callboard.kv.layout import BadRange, OutOfBlocks, StaleReservation
from callboard.kv.reservation import State
from callboard.kv.tokens import num_tokens, pack_tokens

LEASE_S = 10.0


def make(num_blocks=8, block_size=2):
    ids = map(str, itertools.count())
    manager = BlockManager(num_blocks, block_size, lease_s=LEASE_S, new_id=lambda: next(ids))
    manager.attach("e", "e-1")
    return manager


def run(manager, ids, sequence_id="s"):
    """Let engine "e" compute a sequence and end it."""
    grant = manager.admit("e", sequence_id, pack_tokens(ids))
    manager.finish("e", sequence_id, pack_tokens(ids), grant.block_table)
    return grant


def write(manager, held, *, begin=None, end=None, write_id="w", writer="p"):
    reservation = held.reservation
    manager.reservations.open_write(
        reservation.id,
        write_id,
        begin=reservation.begin if begin is None else begin,
        end=reservation.end if end is None else end,
        writer=writer,
        now=0.0,
    )


def fill(manager, held):
    """Write all of a reservation."""
    write(manager, held)
    manager.reservations.close_write(held.reservation.id, "w", is_complete=True, now=0.0)


def reserve(manager, ids, end=None, *, key=("r", 0), now=0.0):
    return manager.reservations.reserve(key, pack_tokens(ids), end, now=now)


def test_a_reservation_covers_what_the_cache_lacks():
    manager = make()
    run(manager, [1, 2, 3, 4])
    held = reserve(manager, [1, 2, 3, 4, 5, 6, 7], end=5)
    assert (held.reservation.begin, held.reservation.end, held.num_cached_tokens) == (4, 5, 4)
    assert held.block_table[:2] == manager.cache.match(pack_tokens([1, 2, 3, 4])).blocks


def test_a_hit_may_reach_past_the_end():
    manager = make()
    run(manager, [1, 2, 3, 4])
    held = reserve(manager, [1, 2, 3, 4, 5], end=1)
    assert (held.reservation.begin, held.reservation.end, held.num_cached_tokens) == (1, 1, 4)
    grant = manager.adopt("e", "s", pack_tokens([1, 2, 3, 4, 5]), held.reservation.id)
    assert grant.num_cached_tokens == 4
    assert len(grant.block_table) == 3


def test_what_arrived_is_cached_and_adopted():
    manager = make()
    prompt = [1, 2, 3, 4, 5]
    held = reserve(manager, prompt, end=3)
    fill(manager, held)
    assert manager.cache.match(pack_tokens(prompt)).num_tokens == 2
    grant = manager.adopt("e", "s", pack_tokens(prompt), held.reservation.id)
    assert grant.num_cached_tokens == 3
    assert grant.block_table == held.block_table
    assert len(grant.block_table) == 3
    assert manager.counts().reserved == 0
    manager.reservations.release(held.reservation.id)
    assert manager.counts().leased == 3


def test_nothing_is_cached_before_it_has_arrived():
    manager = make()
    held = reserve(manager, [1, 2, 3, 4])
    write(manager, held)
    assert manager.cache.match(pack_tokens([1, 2, 3, 4])).num_tokens == 0
    with pytest.raises(StaleReservation):
        manager.adopt("e", "s", pack_tokens([1, 2, 3, 4]), held.reservation.id)


def test_a_reservation_holds_room_for_the_whole_prompt_so_that_adopting_it_never_waits():
    manager = make(num_blocks=8)
    first, second = (reserve(manager, [i] * 4, end=1, key=(str(i), 0)) for i in (1, 2))
    with pytest.raises(OutOfBlocks):
        reserve(manager, [3] * 4, end=1, key=("3", 0))
    for held in (first, second):
        fill(manager, held)
        assert len(manager.adopt("e", held.key[0], held.prompt, held.reservation.id).block_table) == 2


def test_reservations_still_to_be_filled_leave_half_of_the_pool_to_those_who_fill():
    manager = make(num_blocks=8)
    first = reserve(manager, [1] * 10, key=("1", 0))  # alone it may have more than half
    with pytest.raises(OutOfBlocks):
        reserve(manager, [2] * 4, key=("2", 0))
    fill(manager, first)
    reserve(manager, [2] * 4, key=("2", 0))


def test_a_longer_prompt_than_was_announced_gets_more_blocks_when_it_is_adopted():
    manager = make()
    held = reserve(manager, [1, 2, 3])
    fill(manager, held)
    grant = manager.adopt("e", "s", pack_tokens([1, 2, 3, 4, 5, 6]), held.reservation.id)
    assert grant.block_table[:2] == held.block_table
    assert (len(grant.block_table), grant.num_cached_tokens) == (3, 3)


def test_a_reservation_is_not_adopted_for_other_tokens():
    manager = make()
    held = reserve(manager, [1, 2, 3, 4])
    fill(manager, held)
    with pytest.raises(StaleReservation, match="other tokens"):
        manager.adopt("e", "s", pack_tokens([1, 2, 3, 5]), held.reservation.id)


def test_a_repeated_prep_recv_gets_the_same_blocks_and_a_new_lease():
    manager = make()
    first = reserve(manager, [1, 2, 3, 4])
    again = reserve(manager, [1, 2, 3, 4], now=5.0)
    assert again is first
    assert manager.reservations.next_expiry() == 5.0 + LEASE_S
    with pytest.raises(BadRange):
        reserve(manager, [1, 2, 3, 4], end=2)


def test_a_released_request_may_reserve_again():
    manager = make()
    first = reserve(manager, [1, 2, 3, 4])
    write(manager, first)
    manager.reservations.release(first.reservation.id)
    second = reserve(manager, [1, 2, 3, 4])
    assert not set(second.block_table) & set(first.block_table)
    manager.reservations.close_write(first.reservation.id, "w", is_complete=False, now=0.0)
    assert manager.counts().quarantined == 0
    assert manager.check_integrity() == []


def test_a_repeated_admission_gets_the_same_answer():
    manager = make()
    assert manager.admit("e", "s", pack_tokens([1, 2])) == manager.admit("e", "s", pack_tokens([1, 2]))
    assert manager.counts().leased == 1


def test_a_sequence_grows_out_of_its_slab():
    manager = make()
    grant = manager.admit("e", "s", pack_tokens([1, 2, 3]))
    slab = manager.refill("e", 3)
    table = [*grant.block_table, slab[0]]
    manager.finish("e", "s", pack_tokens([1, 2, 3, 4, 5, 6]), table)
    assert manager.cache.match(pack_tokens([1, 2, 3, 4, 5, 6])).blocks == tuple(table)
    assert manager.slabs() == {"e": 2}
    manager.give("e", slab)
    assert manager.counts().leased == 0
    assert manager.check_integrity() == []


def test_a_finish_may_be_repeated():
    manager = make()
    grant = run(manager, [1, 2, 3, 4])
    manager.finish("e", "s", pack_tokens([1, 2, 3, 4]), grant.block_table)
    assert manager.counts().cached == 2


def test_a_foreign_block_in_a_table_is_refused_and_the_rest_is_given_back():
    manager = make()
    other = manager.admit("e", "other", pack_tokens([7, 8]))
    grant = manager.admit("e", "s", pack_tokens([1, 2]))
    with pytest.raises(ValueError, match="neither"):
        manager.finish("e", "s", pack_tokens([1, 2, 7, 8]), [*grant.block_table, *other.block_table])
    assert manager.counts().leased == 1
    assert manager.check_integrity() == []


def test_a_sequence_that_can_never_fit_says_how_much_it_would_take():
    with pytest.raises(OutOfBlocks) as refusal:
        make(num_blocks=2).admit("e", "s", pack_tokens(range(6)))
    assert refusal.value.needed == 3


def test_a_shortage_changes_nothing():
    manager = make(num_blocks=4)
    run(manager, [1, 2, 3, 4])
    manager.admit("e", "s", pack_tokens([5, 6]))
    before = manager.counts()
    with pytest.raises(OutOfBlocks):
        manager.admit("e", "t", pack_tokens([1, 2, 3, 4, 5, 6, 7, 8]))
    assert manager.counts() == before
    assert manager.cache.match(pack_tokens([1, 2, 3, 4])).num_tokens == 4


def test_a_refill_gives_what_there_is():
    manager = make(num_blocks=3)
    assert len(manager.refill("e", 5)) == 3
    assert manager.refill("e", 1) == []


def test_an_engine_that_died_gives_all_back_and_leaves_its_prefixes():
    manager = make()
    account = manager.account("e")
    grant = manager.admit("e", "s", pack_tokens([1, 2, 3]))
    manager.seal("e", "s", pack_tokens([1, 2, 3]), grant.block_table)
    manager.refill("e", 2)
    manager.detach(account, is_known=True)
    assert (manager.counts().free, manager.counts().cached) == (7, 1)


def test_blocks_of_an_engine_that_is_out_of_reach_wait_for_its_return():
    manager = make()
    manager.admit("e", "s", pack_tokens([1, 2, 3]))
    manager.detach(manager.account("e"), is_known=False)
    assert manager.counts().quarantined == 2
    with pytest.raises(UnknownActor):
        manager.admit("e", "t", pack_tokens([1]))
    manager.attach("e", "e-2")
    assert manager.counts().free == 8


def test_an_old_tie_that_breaks_late_takes_nothing_from_the_new_one():
    manager = make()
    old = manager.account("e")
    manager.attach("e", "e-2")
    manager.admit("e", "s", pack_tokens([1, 2]))
    manager.detach(old, is_known=True)
    assert manager.counts().leased == 1


def test_an_unwritten_reservation_expires():
    manager = make()
    reserve(manager, [1, 2, 3])
    manager.reservations.expire(LEASE_S - 1)
    assert manager.counts().reserved == 2
    manager.reservations.expire(LEASE_S)
    assert manager.counts().free == 8


def test_a_reservation_that_somebody_waits_for_does_not_expire():
    manager = make()
    held = reserve(manager, [1, 2, 3])
    manager.reservations.await_seal(held.reservation.id)
    manager.reservations.expire(LEASE_S)
    assert held.reservation.state is State.RESERVED
    manager.reservations.end_await(held.reservation.id, now=LEASE_S)
    manager.reservations.expire(2 * LEASE_S)
    assert manager.counts().free == 8


def test_a_write_renews_the_lease_while_its_writer_is_heard_of():
    manager = make()
    held = reserve(manager, [1, 2, 3])
    manager.reservations.tie("p")
    write(manager, held)
    manager.reservations.expire(LEASE_S)
    assert held.reservation.state is State.WRITING
    manager.reservations.untie("p", is_dead=False)
    manager.reservations.expire(2 * LEASE_S)
    assert manager.counts().quarantined == 2
    manager.reservations.writer_died("p")
    assert manager.counts().free == 8


def test_sending_what_is_cached_needs_no_engine():
    manager = make()
    run(manager, [1, 2, 3, 4])
    loan = manager.lend("nobody", pack_tokens([1, 2, 3, 4, 5]), 3)
    assert loan.engine is None
    assert len(loan.block_table) == 2
    manager.end_loan(loan)
    assert manager.counts().cached == 2


def test_a_computed_loan_survives_its_engine():
    manager = make()
    loan = manager.lend("e", pack_tokens([1, 2, 3]), 3)
    assert manager.has_computed(loan)
    manager.detach(manager.account("e"), is_known=True)
    assert manager.counts().leased == 2
    manager.end_loan(loan)
    assert (manager.counts().cached, manager.counts().free) == (1, 7)


def test_a_loan_whose_engine_died_is_not_taken_for_computed():
    manager = make()
    loan = manager.lend("e", pack_tokens([1, 2, 3]), 3)
    manager.detach(manager.account("e"), is_known=True)
    assert not manager.has_computed(loan)
    manager.end_loan(loan)
    assert manager.counts().free == 8


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
