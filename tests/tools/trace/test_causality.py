"""Clocks of several hosts: no effect is shown before its cause, and nothing is moved further than it must be."""

import itertools
import random
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from synthetic_trace import Writer, disaggregated

from callboard.bus.taps import ANSWERED, ENDED, RECEIVED, SENT
from callboard.tools.trace.causality import causes, clocks_of, in_order
from callboard.tools.trace.event import Event
from callboard.tools.trace.story import assemble

ROUNDING_S = 1e-7


def seen(events: list[Event], offsets: dict[str, float], errors: dict[str, float], drift: float = 0.0) -> list[Event]:
    """Return true events as a reader has them whose knowledge of each node's clock is wrong by its offset."""

    def shown(event: Event) -> Event:
        def at(time: float) -> float:
            return time + offsets[event.node] + drift * time if time else 0.0

        return replace(event, time=at(event.time), begin=at(event.begin), error_s=errors[event.node])

    return [shown(event) for event in events]


def assert_causes_come_first(events: list[Event], *, tolerance_s: float = 0.0) -> None:
    for (_, cause), (_, effect) in causes(events):
        assert cause <= effect + tolerance_s


def history(rng: random.Random, num_nodes: int, num_calls: int) -> list[Event]:
    """A request that wanders between nodes: calls within calls, with random times."""
    writer = Writer("r", itertools.count(1))
    now = 100.0

    def call(here: str, depth: int) -> None:
        nonlocal now, num_calls
        num_calls -= 1
        there = f"n{rng.randrange(num_nodes)}"
        made = writer.call("Admit", there, here, now, 0)
        now = made.received + rng.expovariate(100)
        while num_calls > 0 and depth < 5 and rng.random() < 0.5:
            call(there, depth + 1)
        now = writer.end(made, now) + rng.expovariate(1000)

    while num_calls > 0:
        call("n0", 0)
    return writer.events


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**32), st.integers(2, 6), st.integers(1, 12))
def test_clocks_within_their_errors_are_set_right_by_one_shift_each(seed: int, num_nodes: int, num_calls: int) -> None:
    rng = random.Random(seed)
    errors = {f"n{index}": rng.choice([0.0, 1e-4, 0.003, 0.2]) for index in range(num_nodes)}
    errors["n0"] = 0.0
    events = seen(history(rng, num_nodes, num_calls), {n: rng.uniform(-e, e) for n, e in errors.items()}, errors)
    corrected = in_order(events)
    assert_causes_come_first(corrected)
    shifts = defaultdict(list)
    for before, after in zip(events, corrected, strict=True):
        shifts[before.node].append(after.time - before.time)
        if before.begin:
            shifts[before.node].append(after.begin - before.begin)
    for node, each in shifts.items():
        assert max(each) - min(each) < ROUNDING_S
        assert abs(each[0]) <= errors[node] + ROUNDING_S


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32))
def test_what_is_in_order_already_is_left_alone(seed: int) -> None:
    events = history(random.Random(seed), 4, 8)
    assert in_order(events) is events


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32), st.integers(2, 5))
def test_what_no_shift_explains_is_clamped_and_the_order_of_each_node_stays(seed: int, num_nodes: int) -> None:
    rng = random.Random(seed)
    errors = {f"n{index}": 0.001 for index in range(num_nodes)}
    events = seen(history(rng, num_nodes, 10), {n: rng.uniform(-0.01, 0.01) for n in errors}, errors)
    corrected = in_order(events)
    assert_causes_come_first(corrected)
    for node in errors:
        pairs = [(b.time, a.time) for b, a in zip(events, corrected, strict=True) if b.node == node]
        pairs.sort()
        assert [after for _, after in pairs] == sorted(after for _, after in pairs)
    assert all(event.begin <= event.time for event in corrected)


def test_only_the_host_that_is_wrong_is_moved_and_no_further_than_to_its_cause() -> None:
    writer = Writer("r", itertools.count(1))
    call = writer.call("Admit", "far", "near", 10.0, 0)
    writer.end(call, 10.1)
    errors = {"near": 0.0, "far": 0.02}
    late = in_order(seen(writer.events, {"near": 0.0, "far": -0.0102}, errors))
    [sent] = [event.time for event in late if event.record.what == SENT]
    [received] = [event.time for event in late if event.record.what == RECEIVED]
    assert sent == 10.0
    assert received == pytest.approx(10.0, abs=ROUNDING_S)


def test_nodes_of_one_host_are_shifted_together() -> None:
    """The far host's clock is 10 ms behind; only one of its two nodes talks to the near one."""
    writer = Writer("r", itertools.count(1))
    first = writer.call("RemoteSend", "far1", "near", 10.0, 0)
    second = writer.call("OpenWrite", "far2", "far1", first.received + 0.001, first.span)
    writer.end(first, writer.end(second, second.received + 0.001))
    offsets = {"near": 0.0, "far1": -0.01, "far2": -0.01}
    events = seen(writer.events, offsets, {"near": 0.0, "far1": 0.05, "far2": 0.05})
    assert clocks_of(events) == {"near": "near", "far1": "far1", "far2": "far1"}
    moved = {b.node: a.time - b.time for b, a in zip(events, in_order(events), strict=True)}
    assert moved["far1"] == pytest.approx(moved["far2"], abs=ROUNDING_S)
    assert moved["far1"] == pytest.approx(0.0098, abs=ROUNDING_S)


def test_a_host_whose_nodes_contradict_each_other_has_them_shifted_apart() -> None:
    """They have one offset by chance, and clocks of their own."""
    writer = Writer("r", itertools.count(1))
    writer.end(writer.call("Admit", "a", "near", 10.0, 0), 10.001)
    writer.end(writer.call("Admit", "b", "a", 10.0005, 0), 10.0008)
    events = seen(writer.events, {"near": 0.0, "a": 0.0, "b": 0.0}, {"near": 0.0, "a": 0.01, "b": 0.01})
    events = [replace(e, time=e.time - 0.002, begin=e.begin - 0.002) if e.node == "b" else e for e in events]
    events = [replace(e, record=structs.replace(e.record, time=e.time, begin=e.begin)) for e in events]
    assert clocks_of(events)["b"] == clocks_of(events)["a"]
    assert_causes_come_first(in_order(events))


def test_an_end_that_its_caller_did_not_hear_of_bounds_nothing() -> None:
    writer = Writer("r", itertools.count(1))
    call = writer.call("Admit", "far", "near", 10.0, 0)
    writer.end(call, 10.5, error="cancelled")
    events = [replace(e, time=10.1) if e.record.what == ENDED else e for e in writer.events]
    assert in_order(events) is events


def test_a_story_of_two_hosts_shows_no_effect_before_its_cause() -> None:
    true = disaggregated("r", 5.0)
    errors = {event.node: 0.0 if event.node in ("control", "kv-cpu1", "decode") else 0.004 for event in true}
    for offset in (-0.004, -0.001, 0.002, 0.004):
        events = seen(true, {node: offset if error else 0.0 for node, error in errors.items()}, errors)
        story = assemble(events)["r"]
        assert story.clock_error_s == 0.004
        for span in story.spans:
            for child in span.children:
                assert span.end is not None
                assert child.end is not None
                assert span.begin <= child.begin <= child.end <= span.end


def test_an_answer_that_was_noted_after_it_was_heard_moves_alone() -> None:
    """The process that gave it was held up between telling and noting it; all nodes have one clock."""
    true = disaggregated("r", 5.0)
    late = [
        replace(event, time=event.time + 0.05)
        if (event.record.what, event.record.name) == (ANSWERED, "RemoteSend")
        else event
        for event in true
    ]
    corrected = in_order(late)
    assert_causes_come_first(corrected)
    moved = [after for before, after in zip(late, corrected, strict=True) if before != after]
    assert [(event.record.what, event.record.name) for event in moved] == [(ANSWERED, "RemoteSend")]
