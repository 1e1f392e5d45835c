"""The transition table in ARCHITECTURE.md is what the code does."""

import copy
from pathlib import Path

from callboard.kv.layout import BadRange, StaleReservation
from callboard.kv.reservation import Reservation, State

HEADING = "## Reservations: the transition table"
PAGE = Path(__file__).parents[3] / "ARCHITECTURE.md"
WRITES = {"a": (0, 1, "p"), "b": (1, 2, "q"), "c": (0, 2, "p")}
"""Two writes that fill the reservation ``[0, 2)``, and one that is as long as it."""
Outcomes = dict[tuple[str, str], set[str]]
COLUMNS = {
    "open a write": [("open", write_id) for write_id in WRITES],
    "a write closes complete": [("complete", write_id) for write_id in WRITES],
    "a write closes incomplete": [("abort", write_id) for write_id in WRITES],
    "its writer is dead": [("dead", writer) for writer in ("p", "q")],
    "adopt": [("adopt", "")],
    "release": [("release", "")],
    "expire": [("expire", "")],
}


def happens(reservation: Reservation, kind: str, name: str) -> None:
    if kind == "open":
        begin, end, writer = WRITES[name]
        reservation.open_write(name, begin=begin, end=end, writer=writer)
    elif kind in ("complete", "abort"):
        reservation.close_write(name, is_complete=kind == "complete")
    elif kind == "dead":
        reservation.writer_died(name)
    else:
        getattr(reservation, kind)()


def can_happen(reservation: Reservation, kind: str, name: str) -> bool:
    """Return whether an event is none of those that are said twice, or of nobody."""
    if kind == "open":
        return name not in reservation.writes
    if kind in ("complete", "abort"):
        return name in reservation.writes
    return kind != "dead" or any(write.writer == name for write in reservation.writes.values())


def look(reservation: Reservation) -> tuple[object, ...]:
    closed = frozenset(reservation._closed)
    return (reservation.state, frozenset(reservation.writes), tuple(reservation.written), closed, reservation._left_as)


def outcomes_of_the_code() -> tuple[Outcomes, int]:
    """Return the outcomes of every event in every state that a reservation of two tokens can be in, and how many."""
    first = Reservation("r", begin=0, end=2, expires_at=0.0)
    pending, seen, found = [first], {look(first)}, dict[tuple[str, str], set[str]]()
    while pending:
        before = pending.pop()
        for column, events in COLUMNS.items():
            cell = found.setdefault((str(before.state), column), set())
            for kind, name in events:
                if not can_happen(before, kind, name):
                    continue
                after = copy.deepcopy(before)
                try:
                    happens(after, kind, name)
                    is_refused = False
                except (StaleReservation, BadRange):
                    is_refused = kind != "complete"
                if is_refused:
                    assert look(after) == look(before), (kind, name)
                    cell.add("refused")
                elif after.state is before.state and kind in ("release", "expire", "adopt"):
                    cell.add("same")
                else:
                    cell.add(str(after.state))
                if look(after) not in seen:
                    seen.add(look(after))
                    pending.append(after)
    return found, len(seen)


def outcomes_of_the_page(text: str) -> Outcomes:
    """Return what the table under the heading says."""
    assert HEADING in text, f"{PAGE.name} has no heading {HEADING!r}"
    lines = text[text.index(HEADING) :].splitlines()[1:]
    rows: list[list[str]] = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    (_, *columns), _, *body = rows
    return {
        (state, column): set() if cell == "-" else {outcome.strip() for outcome in cell.split(",")}
        for state, *cells in body
        for column, cell in zip(columns, cells, strict=True)
    }


def test_the_table_says_what_the_code_does():
    found, num_states = outcomes_of_the_code()
    assert num_states > 30
    assert {state for state, _ in found} == {str(state) for state in State}
    assert outcomes_of_the_page(PAGE.read_text()) == found


def test_a_table_that_says_something_else_is_noticed():
    text = PAGE.read_text().replace("| sealed | refused |", "| sealed | writing |")
    assert outcomes_of_the_page(text) != outcomes_of_the_code()[0]
