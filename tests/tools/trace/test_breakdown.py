"""Where a request's time went: every instant counts once, and what nothing is known of is shown."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_trace import Shape, Writer, disaggregated

from callboard.bus.taps import ENDED
from callboard.tools.trace.breakdown import PRIORITY, Breakdown, breakdown
from callboard.tools.trace.event import Event
from callboard.tools.trace.story import assemble


def of(events: list[Event]) -> Breakdown:
    [story] = assemble(events).values()
    return breakdown(story)


def seconds(found: Breakdown, category: str, actor: str, name: str) -> float:
    [part] = [part for part in found.parts if (part.category, part.actor, part.name) == (category, actor, name)]
    return part.seconds


def http_with(*spans: tuple[str, str, float, float, str]) -> list[Event]:
    """A request from 0 to 10 s with phases (name, actor, begin, end, category) in it."""
    writer = Writer("r", itertools.count(1))
    root = next(writer.ids)
    for name, actor, begin, end, category in spans:
        writer.span(name, actor, begin, end, root, category=category)
    writer.span("http", "frontend", 0.0, 10.0, 0, span=root)
    return writer.events


def test_the_parts_and_the_rest_are_the_whole() -> None:
    found = of(disaggregated("r", 5.0))
    assert found.explained_s + found.unexplained_s == pytest.approx(found.jct_s)
    assert found.jct_s == pytest.approx(2.0263)
    assert found.share > 0.999
    assert found.is_over


def test_what_each_took_is_what_was_noted_of_it() -> None:
    found = of(disaggregated("r", 5.0, Shape(wait_blocks_s=0.3)))
    assert seconds(found, "queue", "kv-cpu1", "blocks") == pytest.approx(0.3)
    # Only what the waiting itself does not account for.
    assert seconds(found, "kv", "kv-cpu1", "prep_recv") == pytest.approx(0.0003)
    assert seconds(found, "compute", "prefill", "compute") == pytest.approx(0.25)
    assert seconds(found, "compute", "decode", "decode") == pytest.approx(31 * 0.055)
    # Of 12 ms of sending, what was not hidden behind computing.
    assert seconds(found, "send", "kv-cpu0", "send") == pytest.approx(0.0024)


def test_of_what_goes_on_at_once_the_first_by_priority_has_the_time() -> None:
    found = of(http_with(("send", "kv", 1.0, 6.0, "send"), ("compute", "p", 2.0, 4.0, "compute")))
    assert seconds(found, "compute", "p", "compute") == pytest.approx(2.0)
    assert seconds(found, "send", "kv", "send") == pytest.approx(3.0)
    assert found.unexplained_s == pytest.approx(5.0)


def test_gaps_say_between_which_events_they_lie() -> None:
    found = of(http_with(("queue", "p", 1.0, 2.0, "queue"), ("prefill", "p", 4.0, 10.0, "compute")))
    assert [(gap.begin, gap.end) for gap in found.gaps] == [(0.0, 1.0), (2.0, 4.0)]
    assert found.gaps[1].after == "end of queue of p"
    assert found.gaps[1].before == "begin of prefill of p"


def test_a_span_without_a_recorded_end_explains_nothing() -> None:
    events = disaggregated("r", 5.0, Shape(wait_blocks_s=0.3))
    lost = [e for e in events if not (e.record.what == ENDED and e.record.name == "PrepRecv")]
    before, after = of(events), of(lost)
    assert after.unexplained_s > before.unexplained_s
    assert after.jct_s == before.jct_s


def test_calls_and_what_only_holds_others_explain_nothing() -> None:
    writer = Writer("r", itertools.count(1))
    root = next(writer.ids)
    call = writer.call("RemoteSend", "kv", "main", 1.0, root)
    writer.end(call, 9.0)
    writer.span("http", "frontend", 0.0, 10.0, 0, span=root)
    found = of(writer.events)
    assert {part.category for part in found.parts} == {"bus"}
    assert found.explained_s == pytest.approx(0.0004)


def test_a_request_under_way_is_explained_until_its_last_record() -> None:
    found = of([event for event in disaggregated("r", 5.0, Shape(wait_blocks_s=0.3)) if event.time < 5.31])
    assert not found.is_over
    assert found.jct_s == pytest.approx(0.3080, abs=1e-3)
    assert found.share > 0.99


def test_without_http_the_generate_call_is_the_whole() -> None:
    events = [event for event in disaggregated("r", 5.0) if event.record.name not in ("http", "read", "tokenise")]
    assert of(events).jct_s == pytest.approx(2.0237)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32))
def test_every_instant_counts_once(seed: int) -> None:
    rng = random.Random(seed)
    spans = []
    for index in range(rng.randrange(12)):
        begin = rng.randrange(-2, 11)
        category = rng.choice(PRIORITY)
        spans.append((f"s{index}", "a", float(begin), float(begin + rng.randrange(6)), category))
    found = of(http_with(*spans))
    assert found.explained_s + found.unexplained_s == pytest.approx(10.0)
    assert sum(gap.seconds for gap in found.gaps) == pytest.approx(found.unexplained_s)
    for second in range(10):
        over = [s for s in spans if s[2] <= second < s[3]]
        is_gap = any(gap.begin <= second < gap.end for gap in found.gaps)
        assert is_gap == (not over)
    for category in PRIORITY:
        had = sum(
            min((PRIORITY.index(s[4]) for s in spans if s[2] <= second < s[3]), default=99) == PRIORITY.index(category)  # type: ignore[arg-type]
            for second in range(10)
        )
        assert found.by_category().get(category, 0.0) == pytest.approx(had)
