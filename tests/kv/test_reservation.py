import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from callboard.kv.layout import BadRange, StaleReservation
from callboard.kv.reservation import Reservation, State


def in_state(state):
    """Return a reservation of [4, 10) in ``state``; where a write is open it is "w" on [4, 10)."""
    reservation = Reservation("r", begin=4, end=10, expires_at=1.0)
    if state is State.RESERVED:
        return reservation
    reservation.open_write("w", begin=4, end=10, writer="p")
    if state is State.WRITING:
        return reservation
    if state is State.QUARANTINED:
        reservation.expire()
        return reservation
    reservation.close_write("w", is_complete=True)
    if state is State.ADOPTED:
        reservation.adopt()
    elif state is State.RELEASED:
        reservation.release()
    elif state is State.EXPIRED:
        reservation.expire()
    assert reservation.state is state
    return reservation


EVENTS = {
    "complete": lambda r: r.close_write("w", is_complete=True),
    "abort": lambda r: r.close_write("w", is_complete=False),
    "death": lambda r: r.writer_died("p"),
    "other death": lambda r: r.writer_died("q"),
    "adopt": lambda r: r.adopt(),
    "release": lambda r: r.release(),
    "expire": lambda r: r.expire(),
}
STALE = StaleReservation
TABLE = {
    State.RESERVED: {"adopt": STALE, "release": State.RELEASED, "expire": State.EXPIRED},
    State.WRITING: {
        "complete": State.SEALED,
        "abort": State.RESERVED,
        "death": State.RESERVED,
        "adopt": STALE,
        "release": State.QUARANTINED,
        "expire": State.QUARANTINED,
    },
    State.SEALED: {"adopt": State.ADOPTED, "release": State.RELEASED, "expire": State.EXPIRED},
    State.QUARANTINED: {"complete": STALE, "abort": State.EXPIRED, "death": State.EXPIRED, "adopt": STALE},
    State.ADOPTED: {"adopt": STALE},
    State.RELEASED: {"adopt": STALE},
    State.EXPIRED: {"adopt": STALE},
}


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", list(EVENTS))
def test_every_event_in_every_state(state, event):
    reservation = in_state(state)
    outcome = TABLE[state].get(event, state)
    if outcome is STALE:
        with pytest.raises(StaleReservation):
            EVENTS[event](reservation)
    else:
        EVENTS[event](reservation)
        assert reservation.state is outcome


def test_an_empty_reservation_is_sealed_from_the_start():
    reservation = Reservation("r", begin=4, end=4, expires_at=1.0)
    reservation.adopt()
    assert reservation.is_over


def test_two_writers_may_meet_inside_a_block():
    reservation = Reservation("r", begin=0, end=10, expires_at=1.0)
    reservation.open_write("a", begin=5, end=10, writer="p")
    reservation.open_write("b", begin=0, end=5, writer="q")
    reservation.close_write("a", is_complete=True)
    assert reservation.state is State.WRITING
    reservation.close_write("b", is_complete=True)
    assert reservation.state is State.SEALED


@pytest.mark.parametrize(("begin", "end"), [(3, 5), (9, 11), (6, 6), (7, 6), (0, 20)])
def test_a_write_outside_the_reservation_is_refused(begin, end):
    reservation = in_state(State.RESERVED)
    with pytest.raises(BadRange, match="inside"):
        reservation.open_write("x", begin=begin, end=end, writer=None)
    assert reservation.state is State.RESERVED


def test_two_writes_of_one_slot_are_refused():
    reservation = Reservation("r", begin=0, end=10, expires_at=1.0)
    reservation.open_write("a", begin=0, end=5, writer=None)
    with pytest.raises(BadRange, match="another write"):
        reservation.open_write("b", begin=4, end=6, writer=None)
    reservation.close_write("a", is_complete=True)
    with pytest.raises(BadRange, match="another write"):
        reservation.open_write("b", begin=4, end=6, writer=None)


def test_an_aborted_write_may_be_tried_again():
    reservation = in_state(State.WRITING)
    reservation.close_write("w", is_complete=False)
    reservation.open_write("again", begin=4, end=10, writer="q")
    reservation.close_write("again", is_complete=True)
    assert reservation.state is State.SEALED


def test_a_repeated_open_or_close_does_nothing():
    reservation = in_state(State.WRITING)
    reservation.open_write("w", begin=4, end=10, writer="p")
    for _ in range(2):
        reservation.close_write("w", is_complete=True)
    assert reservation.state is State.SEALED


def test_a_write_whose_close_came_first_is_not_let_in():
    reservation = in_state(State.RESERVED)
    reservation.close_write("w", is_complete=False)
    with pytest.raises(StaleReservation, match="closed already"):
        reservation.open_write("w", begin=4, end=10, writer="p")
    assert reservation.state is State.RESERVED


def test_quarantine_ends_only_with_the_last_writer():
    reservation = Reservation("r", begin=0, end=10, expires_at=1.0)
    reservation.open_write("a", begin=0, end=5, writer="p")
    reservation.open_write("b", begin=5, end=10, writer="q")
    reservation.release()
    reservation.writer_died("p")
    assert reservation.state is State.QUARANTINED
    reservation.close_write("b", is_complete=False)
    assert reservation.state is State.RELEASED


def test_nobody_is_let_into_a_quarantined_reservation():
    with pytest.raises(StaleReservation):
        in_state(State.QUARANTINED).open_write("x", begin=4, end=5, writer=None)


@given(st.permutations(range(8)), st.lists(st.integers(1, 7), min_size=1, max_size=4, unique=True))
def test_it_is_sealed_exactly_when_every_range_has_arrived(order, cuts):
    edges = [0, *sorted(cuts), 8]
    ranges = list(itertools.pairwise(edges))
    reservation = Reservation("r", begin=0, end=8, expires_at=1.0)
    arrivals = [i for i in order if i < len(ranges)]
    for count, i in enumerate(arrivals, 1):
        reservation.open_write(str(i), begin=ranges[i][0], end=ranges[i][1], writer=None)
        reservation.close_write(str(i), is_complete=True)
        assert (reservation.state is State.SEALED) == (count == len(ranges))
