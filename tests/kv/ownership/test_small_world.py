"""Every interleaving of everything, in a pool so small that all its states can be visited (tests/small_world.py)."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import pytest
from chaos.planted import a_block_returned_in_flight, kv_readable_before_it_arrived
from exploration import explore
from small_world import Asked, Event, Scope

from callboard.kv.block_manager import BlockManager
from callboard.kv.reservation import Reservation, State
from callboard.kv.reservation_table import Held, ReservationTable

MOST = int(os.environ.get("CALLBOARD_TEST_STATES", "0"))
"""States of each scope that is too large for every day; 0: these are left out."""

THREE = Asked((1, 2, 3), 3, (("p", 0, 1), ("q", 1, 3)))
"""Two blocks of two; its writers meet inside of the first, and who adopts it writes into the second."""
TWO = Asked((1, 2), 2, (("p", 0, 1), ("q", 1, 2)))
OWN = Asked((1, 2, 3), 3, (("self", 0, 3),))
MET = Asked((1, 2, 3), 3, (("p", 0, 1), ("self", 1, 3)))

TWO_RESERVATIONS = Scope({"a": THREE, "b": TWO}, others=frozenset({"die", "adopt"}))
TIES = Scope({"a": THREE}, others=frozenset({"die", "adopt", "tie", "await"}))
HAND_OVER = Scope({"a": OWN}, num_blocks=4, others=frozenset({"adopt", "engine"}), lent=(1, 2, 3), num_loans=1)
HAND_OVER_AGAIN = Scope(
    {"a": Asked((1, 2, 3), 3, (("self", 0, 3),), num_tries=2)},
    num_blocks=4,
    others=frozenset({"adopt"}),
    lent=(1, 2, 3),
    num_loans=2,
)
SEALED_AND_LENT = Scope(
    {"a": Asked((1, 2, 3, 4), 3, (("self", 0, 3),)), "b": Asked((1, 2, 3, 4), 4, (("p", 0, 4),))},
    num_blocks=4,
    others=frozenset({"adopt"}),
    lent=(1, 2, 3, 4),
    lent_end=3,
    num_loans=1,
)
"""What is handed over ends inside of a block that may be sealed: who adopts it must not write there."""
SCOPES = {
    "two reservations, three blocks, two writers": (TWO_RESERVATIONS, 2500),
    "ties, and who waits for pages": (TIES, 400),
    "blocks that change hands, and an engine that comes and goes": (HAND_OVER, 200),
    "blocks that change hands after they did not": (HAND_OVER_AGAIN, 300),
    "sealed blocks that change hands": (SEALED_AND_LENT, 300),
}
LARGE = {
    "two tries at every range": Scope(
        {
            "a": Asked((1, 2, 3), 3, (("p", 0, 1), ("q", 1, 3)), num_tries=2),
            "b": Asked((1, 2), 2, (("p", 0, 2),), num_tries=2, most=2),
        },
        others=frozenset({"die", "adopt"}),
    ),
    "ties of two": Scope({"a": THREE, "b": TWO}, others=frozenset({"die", "adopt", "tie", "await"})),
    "a sender elsewhere, and one here": Scope(
        {"a": MET, "b": TWO}, num_blocks=4, others=frozenset({"adopt", "engine", "die"}), lent=(1, 2, 3), num_loans=2
    ),
}


def is_misfortune(event: Event) -> bool:
    """Whether an end that needs this is none: everybody who lives must be able to finish without it."""
    return event[0] in ("die", "engine leaves")


@pytest.fixture(autouse=True)
def the_whole_pool_may_be_reserved() -> Any:
    with patch("callboard.kv.reservation_table.UNFILLED_SHARE", 1.0):
        yield


@pytest.mark.parametrize("name", SCOPES)
def test_nobody_ever_writes_what_is_sealed_or_somebody_elses(name: str) -> None:
    scope, at_least = SCOPES[name]
    explored = explore(scope)
    assert explored.found is None
    assert len(explored.paths) > at_least
    assert {"open", "complete"} <= explored.refused, "nothing ever came too late"
    assert explored.stuck(without=is_misfortune) == []


@pytest.mark.skipif(not MOST, reason="CALLBOARD_TEST_STATES is not set")
@pytest.mark.parametrize("name", LARGE)
def test_nobody_does_so_in_a_larger_world(name: str) -> None:
    explored = explore(LARGE[name], most=MOST)
    assert explored.found is None
    print(f"{name}: {len(explored.paths)} states")
    if len(explored.paths) < MOST:
        assert explored.stuck(without=is_misfortune) == []


# ---- faults that it must find ------------------------------------------------------------------------------------


def two_writers_in_one_slot() -> AbstractContextManager[object]:
    class NoOthers(Reservation):
        def open_write(self, write_id: str, *, begin: int, end: int, writer: str | None) -> None:
            writes, written, self.writes, self.written = self.writes, self.written, {}, []
            try:
                super().open_write(write_id, begin=begin, end=end, writer=writer)
            finally:
                self.writes, self.written = {**writes, **self.writes}, written

    return patch("callboard.kv.reservation_table.Reservation", NoOthers)


def a_write_that_is_let_in_after_its_end() -> AbstractContextManager[object]:
    class Forgets(Reservation):
        def close_write(self, write_id: str, *, is_complete: bool) -> None:
            super().close_write(write_id, is_complete=is_complete)
            self._closed.clear()

    return patch("callboard.kv.reservation_table.Reservation", Forgets)


def a_quarantine_that_ends_with_the_first_writer() -> AbstractContextManager[object]:
    class Hasty(Reservation):
        def close_write(self, write_id: str, *, is_complete: bool) -> None:
            if self.state is State.QUARANTINED:
                self.writes = {i: write for i, write in self.writes.items() if i == write_id}
            super().close_write(write_id, is_complete=is_complete)

    return patch("callboard.kv.reservation_table.Reservation", Hasty)


def adopted_while_it_is_written() -> AbstractContextManager[object]:
    def adopt_anything(self: BlockManager, engine: str, sequence_id: str, tokens: bytes, reservation_id: str) -> Any:
        held = self.reservations.get(reservation_id)
        with patch.object(held.reservation, "state", State.SEALED):
            return adopt_sealed(self, engine, sequence_id, tokens, reservation_id)

    adopt_sealed = BlockManager.adopt
    return patch.object(BlockManager, "adopt", adopt_anything)


def a_broken_tie_taken_for_a_death() -> AbstractContextManager[object]:
    untie = ReservationTable.untie
    return patch.object(ReservationTable, "untie", lambda self, writer, is_dead: untie(self, writer, is_dead=True))


def grafts_that_stay_when_their_write_fails() -> AbstractContextManager[object]:
    close = ReservationTable.close_write

    def close_write(self: ReservationTable, reservation_id: str, write_id: str, **options: Any) -> None:
        held = self._held.get(reservation_id)
        if held is not None and write_id in held.grafts and held.reservation.is_open:
            self._allocator.cache.unpin(held.exchange(held.grafts.pop(write_id)))
        close(self, reservation_id, write_id, **options)

    return patch.object(ReservationTable, "close_write", close_write)


def a_sealed_block_handed_over_to_be_written() -> AbstractContextManager[object]:
    graft = BlockManager.graft

    def graft_all(self: BlockManager, loan: Any, reservation_id: str, write_id: str) -> Any:
        left = graft(self, loan, reservation_id, write_id)
        held: Held = self.reservations.get(reservation_id)
        for begin, _ in left:
            block = loan.block_table[begin // 2]
            self.cache.pin([block])
            held.grafts[write_id][begin // 2] = block
        return ()

    return patch.object(BlockManager, "graft", graft_all)


FAULTS: list[tuple[Callable[[], AbstractContextManager[object]], Scope, str]] = [
    (a_block_returned_in_flight, TWO_RESERVATIONS, "may write block"),
    (kv_readable_before_it_arrived, TWO_RESERVATIONS, "without its KV"),
    (two_writers_in_one_slot, HAND_OVER_AGAIN, "may be written by"),
    (a_write_that_is_let_in_after_its_end, TWO_RESERVATIONS, "let in after"),
    (a_quarantine_that_ends_with_the_first_writer, TWO_RESERVATIONS, "may write block"),
    (adopted_while_it_is_written, TWO_RESERVATIONS, "never arrived"),
    (a_broken_tie_taken_for_a_death, TIES, "may be written by|may write block|let in after"),
    (grafts_that_stay_when_their_write_fails, HAND_OVER_AGAIN, "may write block|somebody else's"),
    (a_sealed_block_handed_over_to_be_written, SEALED_AND_LENT, "somebody else's"),
]


@pytest.mark.parametrize(("fault", "scope", "problem"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS])
def test_a_broken_rule_is_found(
    fault: Callable[[], AbstractContextManager[object]], scope: Scope, problem: str
) -> None:
    with fault():
        explored = explore(scope)
    assert explored.found is not None
    problems, path = explored.found
    assert any(any(part in each for part in problem.split("|")) for each in problems), (problems, path)


def test_a_quarantine_that_never_ends_is_found() -> None:
    class Forever(Reservation):
        def close_write(self, write_id: str, *, is_complete: bool) -> None:
            with patch.object(self, "_left_as", State.QUARANTINED):
                super().close_write(write_id, is_complete=is_complete)

    with patch("callboard.kv.reservation_table.Reservation", Forever):
        explored = explore(Scope({"a": THREE}))
    assert explored.found is None
    assert explored.stuck(without=is_misfortune)
