"""The ring of the last requests' records, and the facts in them: bounded, whatever is noted."""

import random

import msgspec

from callboard.bus import Message
from callboard.bus.taps import (
    MOST_FACTS,
    MOST_TEXT,
    NUM_PER_REQUEST,
    SPAN,
    Trace,
    decode_facts,
    encode_facts,
    facts_of,
)


def test_the_ring_drops_the_oldest_request_and_bounds_each() -> None:
    trace = Trace(keep=3)

    def add(request_id: str, number: int) -> None:
        trace.add((SPAN, float(number), 0.0, "", "", "", "x", request_id, 1, 0, 0, 0, 0.0, "", None, None))

    for number in range(2 * NUM_PER_REQUEST):
        add("long", number)
    assert [row[1] for row in trace.of("long")] == [float(n) for n in range(NUM_PER_REQUEST, 2 * NUM_PER_REQUEST)]
    for number in range(5):
        add(f"r{number}", number)
    assert trace.request_ids() == ["r2", "r3", "r4"]


def test_requests_of_many_records_do_not_fill_memory() -> None:
    trace = Trace(keep=100)
    for number in range(100):
        for _ in range(NUM_PER_REQUEST):
            trace.add((SPAN, 0.0, 0.0, "", "", "", "x", f"r{number}", 1, 0, 0, 0, 0.0, "", None, None))
    assert sum(len(trace.of(request_id)) for request_id in trace.request_ids()) <= 100 * 64
    assert trace.request_ids()[-1] == "r99"


def test_a_request_that_goes_while_it_is_noted_is_not_counted_for_ever() -> None:
    trace, rng = Trace(keep=4), random.Random(1)

    def kept() -> int:
        for _ in range(1000):
            name = f"r{rng.randrange(4)}"
            trace.add((SPAN, 0.0, 0.0, "", "", "", "x", name, 1, 0, 0, 0, 0.0, "", None, None))
        return sum(len(trace.rows_of(request_id)) for request_id in trace.request_ids())

    soon = [kept() for _ in range(50)]
    late = [kept() for _ in range(50)]
    assert sum(late) > 0.9 * sum(soon)
    assert trace.num_made == 100_000


def test_ids_as_long_as_messages_do_not_fill_memory() -> None:
    trace = Trace()
    for length in (256, 257):
        trace.add((SPAN, 0.0, 0.0, "", "", "", "x", "r" * length, 1, 0, 0, 0, 0.0, "", None, None))
    assert [len(request_id) for request_id in trace.request_ids()] == [256]


class Inner(msgspec.Struct):
    reservation_id: str


class Everything(Message, frozen=True):
    request_id: str
    whole: int
    real: float
    flag: bool
    text: str
    long: str
    prompt: bytes
    blob: bytes
    inner: Inner
    nothing: int | None
    pairs: dict[str, str]


def test_facts_are_numbers_and_short_texts_and_never_content() -> None:
    message = Everything("r", 3, 0.5, True, "a", "x" * 1000, bytes(40), b"secret", Inner("i"), None, {"k": "secret"})
    assert decode_facts(facts_of(message)) == {
        "whole": 3,
        "real": 0.5,
        "flag": True,
        "text": "a",
        "num_tokens": 10,
        "reservation": "i",
    }
    assert decode_facts(facts_of(7)) == {}
    long = msgspec.structs.replace(message, inner=Inner("i" * 1000))
    assert "reservation" not in decode_facts(facts_of(long))


def test_facts_that_no_message_can_carry_are_told_as_far_as_they_can_be() -> None:
    facts = {"half": "a\ud800", "huge": 1 << 70, "real": 0.5, "na\udcffme": 1, "list": [1 << 70]}
    told = decode_facts(encode_facts(facts))
    assert told == {"half": "a?", "huge": None, "real": 0.5, "na?me": 1, "list": None}
    many = decode_facts(encode_facts({f"n{number}": "x" * 1000 for number in range(1000)}))
    assert (len(many), many["n0"]) == (MOST_FACTS, "x" * MOST_TEXT)
