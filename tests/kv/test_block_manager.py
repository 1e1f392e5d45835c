"""What a block manager lends, reserves and caches, to whom and for how long."""

import pytest
from block_managers import LEASE_S, fill, make, reserve, run, write

from callboard.bus import UnknownActor
from callboard.kv.layout import BadRange, OutOfBlocks, StaleReservation
from callboard.kv.reservation import State
from callboard.kv.tokens import pack_tokens


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


def test_a_block_that_several_in_quarantine_hold_counts_once():
    manager = make()
    run(manager, [1, 2, 3, 4])
    for sequence_id in ("s", "t"):
        manager.admit("e", sequence_id, pack_tokens([1, 2, 3, 4, 5]))
    manager.detach(manager.account("e"), is_known=False)
    assert manager.num_quarantined == manager.counts().quarantined == 4


def test_what_is_said_under_an_earlier_attachment_does_nothing_in_the_next():
    manager = make()
    before = manager.account("e").attachment
    now = manager.attach("e", "e-1").attachment
    (block,) = manager.refill("e", 1, now)
    manager.give("e", [block], before)  # Of that slab, and on its way for long: the block is in use again.
    assert manager.counts().leased == 1
    for stale in (
        lambda: manager.refill("e", 1, before),
        lambda: manager.admit("e", "s", pack_tokens([1]), before),
        lambda: manager.adopt("e", "s", pack_tokens([1]), "no matter", before),
    ):
        with pytest.raises(UnknownActor):
            stale()
    assert manager.counts().leased == 1
    manager.give("e", [block], now)
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
