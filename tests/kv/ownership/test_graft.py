"""Blocks that change hands inside one pool: what the adopter finds, and what nobody may write into."""

import itertools

import pytest
from block_managers import reserve
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_contents import Pool

from callboard.kv.layout import StaleReservation
from callboard.kv.reservation import State
from callboard.kv.reservation_table import Held
from callboard.kv.tokens import pack_tokens

IDS = list(range(30, 41))
"""Eleven tokens: two full blocks of four, and three in a third."""


def adopt_and_grow(pool: Pool, ids: list[int], held: Held) -> None:
    """Adopt a reservation, compute what lies behind it, and check all that the pool holds."""
    grant = pool.manager.adopt("e", "adopter", pack_tokens(ids), held.reservation.id)
    assert pool.holds(ids, grant.block_table, grant.num_cached_tokens)
    others = [block for block in range(pool.store.num_blocks) if block in pool.manager.cache]
    before = [bytes(pool.store.page(0, 0, block)) for block in others]
    pool.compute(ids, grant.block_table, grant.num_cached_tokens, len(ids))
    assert [bytes(pool.store.page(0, 0, block)) for block in others] == before, "it wrote into a sealed block"
    assert pool.holds(ids, grant.block_table, len(ids))
    pool.manager.finish("e", "adopter", pack_tokens(ids), grant.block_table)
    assert pool.manager.check_integrity() == []


def test_what_was_computed_in_the_same_pool_is_handed_over_without_a_copy():
    pool = Pool()
    held = reserve(pool.manager, IDS, end=10)
    before = held.block_table
    pool.hand_over(IDS, held, 0, 10)
    assert pool.num_copied == 0
    assert held.reservation.state is State.SEALED
    assert not set(held.block_table) & set(before)
    assert pool.manager.counts().free == 24 - 3
    adopt_and_grow(pool, IDS, held)


def test_what_is_cached_in_the_same_pool_is_shared_but_for_a_part_filled_block():
    pool = Pool()
    held = reserve(pool.manager, IDS, end=7)
    pool.run(IDS)  # meanwhile
    pool.hand_over(IDS, held, 0, 7)
    assert pool.num_copied == 3, "the fifth to the seventh token: the eighth is written by who adopts"
    cached = pool.manager.cache.match(pack_tokens(IDS)).blocks
    assert held.block_table[0] == cached[0]
    assert held.block_table[1] != cached[1]
    adopt_and_grow(pool, IDS, held)


def test_a_block_that_two_writers_share_is_copied_token_for_token():
    pool = Pool()
    held = reserve(pool.manager, IDS)
    shared = held.block_table[1]
    pool.hand_over(IDS, held, 6, 11, write_id="second")
    assert pool.num_copied == 2
    pool.hand_over(IDS, held, 0, 6, write_id="first")
    assert pool.num_copied == 4
    assert held.block_table[1] == shared
    adopt_and_grow(pool, IDS, held)


def test_a_writer_that_was_let_in_before_a_block_changed_hands_still_writes_what_is_adopted():
    pool = Pool()
    held = reserve(pool.manager, IDS)
    named = held.block_table
    pool.open(held, "slow", 0, 9)
    loan = pool.lend(IDS, 9)
    pool.hand_over(IDS, held, 9, 11)
    pool.copy(loan.block_table, named, 0, 9)
    pool.manager.end_loan(loan)
    pool.close(held, "slow")
    assert pool.manager.check_integrity() == []
    adopt_and_grow(pool, IDS, held)


@pytest.mark.parametrize(("begin", "end"), [(5, 6), (5, 7), (5, 8), (5, 9), (4, 7), (4, 8), (3, 8), (8, 10), (9, 10)])
def test_a_range_that_ends_inside_of_the_reservation_leaves_the_rest_to_others(begin: int, end: int):
    pool = Pool()
    held = reserve(pool.manager, IDS)
    edges = sorted({0, begin, end, 11})
    for number, (first, last) in enumerate(itertools.pairwise(edges)):
        pool.hand_over(IDS, held, first, last, write_id=str(number))
    assert held.reservation.state is State.SEALED
    adopt_and_grow(pool, IDS, held)


def test_nothing_changes_hands_before_the_write_is_complete():
    pool = Pool()
    pool.run(IDS)
    pool.manager.cache.evict(2)
    held = reserve(pool.manager, IDS)
    before, counts = held.block_table, pool.manager.counts()
    pool.run(IDS)
    pool.open(held, "w", 0, 11)
    loan = pool.lend(IDS, 11)
    assert pool.manager.graft(loan, held.reservation.id, "w") == ()
    assert held.block_table == before
    assert pool.manager.check_integrity() == []
    pool.close(held, "w", is_complete=False)
    pool.manager.end_loan(loan)
    assert held.block_table == before, "the next writer would write into sealed blocks"
    assert held.reservation.state is State.RESERVED
    assert pool.manager.counts().reserved == counts.reserved
    assert pool.manager.check_integrity() == []
    pool.hand_over(IDS, held, 0, 11, write_id="again")
    adopt_and_grow(pool, IDS, held)


@pytest.mark.parametrize("how", ["release", "expire", "death", "release, too late"])
def test_a_hand_over_that_comes_to_nothing_leaks_nothing(how: str):
    pool = Pool()
    pool.run(IDS)
    held = reserve(pool.manager, [*IDS, 1], key=("other", 0))
    pool.manager.reservations.release(held.reservation.id)
    held = reserve(pool.manager, [77, *IDS])
    pool.open(held, "w", 0, 12)
    loan = pool.lend([77, *IDS], 12)
    pool.manager.graft(loan, held.reservation.id, "w")
    reservations = pool.manager.reservations
    if how == "death":
        reservations.writer_died("self")
        reservations.release(held.reservation.id)
    else:
        (reservations.expire(1e9) if how == "expire" else reservations.release(held.reservation.id))
        assert held.reservation.state is State.QUARANTINED
        assert pool.manager.check_integrity() == []
        if how == "release, too late":
            with pytest.raises(StaleReservation):
                pool.close(held, "w")
        else:
            pool.close(held, "w", is_complete=False)
    pool.manager.end_loan(loan)
    counts = pool.manager.counts()
    assert counts.free + counts.cached == counts.num_blocks
    assert pool.manager.check_integrity() == []


def test_a_loan_of_other_tokens_is_not_grafted():
    pool = Pool()
    held = reserve(pool.manager, IDS)
    pool.open(held, "w", 0, 11)
    loan = pool.lend([*IDS[:10], 1], 11)
    with pytest.raises(StaleReservation, match="other tokens"):
        pool.manager.graft(loan, held.reservation.id, "w")
    with pytest.raises(StaleReservation, match="not open"):
        pool.manager.graft(pool.lend(IDS, 11), held.reservation.id, "another")
    pool.manager.reservations.release(held.reservation.id)
    with pytest.raises(StaleReservation, match="quarantined"):
        pool.manager.graft(loan, held.reservation.id, "w")


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_an_adopter_finds_what_copying_would_have_brought(data: st.DataObject):
    size = data.draw(st.integers(1, 5), "block_size")
    length = data.draw(st.integers(1, 24), "length")
    ids = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length), "ids")
    end = data.draw(st.integers(0, length), "end")
    pool = Pool(num_blocks=16 * (24 // size + 2), block_size=size)
    if cached := data.draw(st.integers(0, length), "cached before"):
        pool.run(ids[:cached])
    held = reserve(pool.manager, ids, end)
    begin = held.reservation.begin
    cuts = data.draw(st.lists(st.integers(begin, end), max_size=4, unique=True), "cuts") if begin < end else []
    ranges = list(itertools.pairwise(sorted({begin, *cuts, end})))
    for number, (first, last) in enumerate(data.draw(st.permutations(ranges), "order")):
        how = data.draw(st.sampled_from(["graft", "copy", "cached first", "fails first"]), "how")
        if how == "cached first":
            pool.run(ids[: data.draw(st.integers(1, length), "cached meanwhile")])
        if how == "fails first":
            pool.open(held, f"{number} fails", first, last)
            loan = pool.lend(ids, last)
            pool.manager.graft(loan, held.reservation.id, f"{number} fails")
            pool.manager.end_loan(loan)
            pool.close(held, f"{number} fails", is_complete=False)
        if how == "copy":
            pool.open(held, str(number), first, last)
            loan = pool.lend(ids, last)
            pool.copy(loan.block_table, held.block_table, first, last)
            pool.manager.end_loan(loan)
            pool.close(held, str(number))
        else:
            pool.hand_over(ids, held, first, last, write_id=str(number))
        assert pool.manager.check_integrity() == []
    assert held.reservation.state is State.SEALED
    adopt_and_grow(pool, ids, held)
    match = pool.manager.cache.match(pack_tokens(ids))
    assert match.num_tokens == length // size * size
    assert pool.holds(ids, match.blocks, match.num_tokens)
