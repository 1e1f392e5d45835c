"""The Chrome trace of some requests: it keeps the format's rules, whatever was lost, and says what the records say."""

import io
import json
import random
from collections import Counter
from dataclasses import replace

import pytest
from chrome_trace import InvalidTrace, Slice, Trace, read
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_trace import Shape, disaggregated, load, whole

from callboard.tools.trace import perfetto
from callboard.tools.trace.event import Event
from callboard.tools.trace.story import Story, assemble

TICK_US = 0.0626
"""What a time may be rounded by."""


def stories_of(events: list[Event]) -> list[Story]:
    return list(assemble(events).values())


def file_of(stories: list[Story]) -> bytes:
    file = io.BytesIO()
    perfetto.write(stories, file, fleet="demo")
    return file.getvalue()


def trace_of(events: list[Event]) -> Trace:
    return read(file_of(stories_of(events)))


def test_many_requests_at_once_are_a_valid_file_with_a_slice_for_every_span() -> None:
    stories = stories_of(list(load(200, rate=30, seed=4)))
    trace = read(file_of(stories))
    assert len(trace.slices) == sum(len(story.spans) for story in stories)
    zero = min(story.begin for story in stories)
    told = Counter((s.args["request"], s.name.split(" → ")[0], round(s.begin)) for s in trace.slices if s.category)
    for story in stories:
        for span in story.spans:
            name = f"request {span.request_id}" if span.kind == "http" else span.name
            begin = (span.begin - zero) * 1e6
            assert any(told[span.request_id, name, round(begin + off)] for off in (-TICK_US, TICK_US)), span
    assert trace.about["num_requests"] == 200
    assert trace.about["fleet"] == "demo"


def test_the_tracks_of_one_request_are_its_actors_frontend_first_and_engines_last() -> None:
    trace = trace_of(disaggregated("r", 5.0, Shape()))
    assert [name for name in trace.threads.values() if "#" not in name] == [
        "frontend",
        "main",
        "kv-cpu0",
        "kv-cpu1",
        "prefill",
        "decode",
    ]
    assert list(trace.processes.values()) == ["control", "kv-cpu0", "kv-cpu1", "prefill", "decode"]


def test_what_is_done_at_once_for_one_request_has_tracks_of_its_own() -> None:
    trace = trace_of(disaggregated("r", 5.0, Shape()))
    sends = [each for each in trace.slices if each.name == "send"]
    compute = next(each for each in trace.slices if each.name == "compute_kv → prefill")
    beside = [each for each in sends if each.begin < compute.end]
    assert beside
    for each in beside:
        assert each.thread == f"{compute.thread} #2"


def test_requests_at_once_do_not_share_a_track_of_an_actor() -> None:
    trace = trace_of([*disaggregated("a", 5.0, Shape()), *disaggregated("b", 5.1, Shape())])
    generate = {each.args["request"]: each.thread for each in trace.slices if each.name == "start_generate"}
    assert generate == {"a": "decode", "b": "decode #2"}
    for each in trace.slices:
        assert each.parent is None or each.parent.args["request"] == each.args["request"]


def test_arrows_lead_from_a_way_to_where_it_arrives_and_back() -> None:
    trace = trace_of(disaggregated("r", 5.0, Shape()))
    calls = [each for each in trace.slices if each.category == "call"]
    assert len(trace.flows) == 2 * len(calls) > 10
    for source, target in trace.flows:
        assert source.end == target.begin
        way, serve = (source, target) if source.category == "bus" else (target, source)
        assert way.name == ("request" if way is source else "answer")
        assert way.parent is not None
        assert way.parent.name == f"{serve.name} → {serve.thread.split(' #')[0]}"
    served = Counter(target.name for source, target in trace.flows if source.category == "bus")
    assert served["prep_recv"] == served["remote_send"] == served["start_generate"] == 1


def test_facts_are_arguments_and_errors_are_told() -> None:
    trace = trace_of(disaggregated("r", 5.0, Shape(error="ActorDied: decode is dead")))
    send = next(each for each in trace.slices if each.name == "remote_send → kv-cpu0")
    assert send.args["lane"] == "shm"
    assert send.args["num_tokens"] == 312
    assert send.args["request"] == "r"
    decode = next(each for each in trace.slices if each.name == "decode")
    assert decode.args["error"] == "ActorDied: decode is dead"


def test_times_are_microseconds_from_the_first_event() -> None:
    story = stories_of(disaggregated("r", 1e6, Shape()))[0]
    trace = read(file_of([story]))
    http = next(each for each in trace.slices if each.name == "request r")
    assert min(each.begin for each in trace.slices) == http.begin == 0.0
    assert story.jct_s is not None
    assert http.end == pytest.approx(story.jct_s * 1e6, abs=TICK_US)


def test_what_is_not_over_lasts_until_the_last_record_and_says_so() -> None:
    events = [event for event in disaggregated("r", 5.0, Shape()) if event.time < 5.5]
    trace = trace_of(events)
    start = next(each for each in trace.slices if each.name == "start_generate → decode")
    assert start.args["is_open"] is True
    assert start.end == max(each.end for each in trace.slices)


def test_how_far_clocks_may_be_apart_is_told() -> None:
    events = disaggregated("r", 5.0, Shape())
    events = [replace(event, error_s=0.00012) if event.node == "prefill" else event for event in events]
    data = file_of(stories_of(events))
    trace = read(data)
    assert trace.about["clock_error_us"] == pytest.approx(120)
    labels = {e["pid"]: e["args"]["labels"] for e in json.loads(data)["traceEvents"] if e["name"] == "process_labels"}
    named = {name: labels[pid] for pid, name in trace.processes.items()}
    assert named["prefill"] == "engine, clock ± 120 µs"
    assert named["decode"] == "engine"
    compute = next(each for each in trace.slices if each.name == "compute")
    assert compute.args["clock_error_us"] == pytest.approx(120)


def test_a_file_of_no_request_is_valid() -> None:
    assert read(file_of([])).slices == []


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0.0, 1.0),
    shift=st.floats(-0.01, 0.01),
    digits=st.sampled_from([0, 3, 5]),
)
def test_whatever_is_lost_and_however_wrong_clocks_are_the_file_is_valid(
    seed: int, share: float, shift: float, digits: int
) -> None:
    rng = random.Random(seed)
    events = [*load(5, rate=50, seed=seed), *whole("w", rng.random() / 10, Shape())]
    kept = [event for event in events if rng.random() >= share]
    shifted = [_moved(event, shift if event.node == "decode" else 0.0, digits) for event in kept]
    stories = stories_of(shifted)
    trace = read(file_of(stories))
    assert len(trace.slices) == sum(len(story.spans) for story in stories)


def _moved(event: Event, seconds: float, digits: int) -> Event:
    """Shift an event; with ``digits``, round its times, so that many are equal."""

    def moved(time: float) -> float:
        return (round(time + seconds, digits) if digits else time + seconds) if time else 0.0

    return replace(event, time=moved(event.time), begin=moved(event.begin), first=moved(event.first))


# ---- the reader of these tests ------------------------------------------------------------------------------------


def break_by(change: str) -> bytes:
    content = json.loads(file_of(stories_of(disaggregated("r", 5.0, Shape()))))
    events = content["traceEvents"]
    first = next(index for index, event in enumerate(events) if event["ph"] == "B")
    if change == "no end":
        del events[-1]
    elif change == "no name":
        events.remove(next(event for event in events if event["name"] == "thread_name"))
    elif change == "overlap":
        ends = [index for index, event in enumerate(events) if event["ph"] == "E"]
        a, b = ends[-2:]
        events[a]["name"], events[b]["name"] = events[b]["name"], events[a]["name"]
    elif change == "order":
        events[first]["ts"] = 1e9
    elif change == "no time":
        events[first]["ts"] = float("nan")
    elif change == "no category":
        del events[first]["cat"]
    elif change == "an arrow from nowhere":
        events.insert(first, next(event for event in events if event["ph"] == "s"))
    elif change == "half an arrow":
        events.remove(next(event for event in events if event["ph"] == "f"))
    elif change == "a fraction of a nanosecond":
        events[first]["ts"] = 0.0001
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    "change",
    [
        *("no end", "no name", "overlap", "order", "no time", "no category", "an arrow from nowhere", "half an arrow"),
        "a fraction of a nanosecond",
    ],
)
def test_a_broken_file_is_found_out(change: str) -> None:
    read(break_by("nothing"))
    with pytest.raises(InvalidTrace):
        read(break_by(change))


def test_slices_know_what_they_are_in() -> None:
    trace = trace_of(disaggregated("r", 5.0, Shape()))
    prefill: Slice = next(each for each in trace.slices if each.name == "prefill")
    assert prefill.parent is not None
    assert prefill.parent.name == "start_generate"
