"""Stories: the tree of spans that records tell, whatever is missing of them."""

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import msgspec
import pytest
from fleet import running_fleet
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_trace import Shape, Writer, disaggregated, whole

from callboard.actors.engine.simulated import SimulatedRunner, Simulation
from callboard.actors.protocol import SamplingParams
from callboard.bus import VirtualClock
from callboard.bus.taps import ANSWERED, ENDED, RECEIVED, SENT, SPAN, TapRecord, finished
from callboard.bus.testing import run_virtual
from callboard.bus.transports.sim import SimHub
from callboard.tools.trace.event import Event, event_of
from callboard.tools.trace.story import Span, Story, assemble, verb_of


def story_of(events: list[Event], request_id: str = "r") -> Story:
    stories = assemble(events)
    assert list(stories) == [request_id]
    return stories[request_id]


def walk(span: Span) -> Iterator[Span]:
    yield span
    for child in span.children:
        assert child.parent is span
        yield from walk(child)


def path(span: Span | None) -> str:
    names = []
    while span is not None:
        names.append(span.name)
        span = span.parent
    return " < ".join(names)


def find(story: Story, name: str, kind: str = "call") -> Span:
    [span] = [span for span in story.spans if span.name == name and span.kind == kind]
    return span


EVENTS = disaggregated("r", 5.0)


def test_a_whole_request_is_one_tree() -> None:
    story = story_of(EVENTS)
    [root] = story.roots
    assert (root.kind, root.name, root.actor) == ("http", "http", "frontend")
    assert {id(span) for span in walk(root)} == {id(span) for span in story.spans}
    assert path(find(story, "compute_kv")) == (
        "compute_kv < remote_send < remote_send < attempt < generate < generate < http"
    )
    assert path(find(story, "prefill", "phase")) == (
        "prefill < start_generate < start_generate < attempt < generate < generate < http"
    )
    assert [span.name for span in story.sub_requests] == ["prep_recv", "remote_send", "start_generate"]


def test_a_story_says_what_a_reader_wants_to_know_first() -> None:
    story = story_of(EVENTS)
    assert (story.num_prompt_tokens, story.num_tokens, story.model) == (312, 32, "smollm2-135m")
    assert (story.script, story.version, story.error) == ("disaggregate", "1", "")
    assert story.jct_s == pytest.approx(2.0263)
    assert story.ttft_s == pytest.approx(0.3209)
    assert story.wall == pytest.approx(1.7e9 + 5.0)


def test_a_call_is_seen_from_both_sides_and_on_both_ways() -> None:
    call = find(story_of(EVENTS), "remote_send")
    there, serve, back = call.children
    assert (there.kind, serve.kind, back.kind) == ("bus", "serve", "bus")
    assert call.begin == there.begin <= there.end == serve.begin <= serve.end == back.begin <= back.end == call.end
    assert (call.source, call.actor, call.node, serve.node) == ("main", "kv-cpu0", "control", "kv-cpu0")
    assert call.facts["num_tokens"] == 312
    assert call.facts["lane"] == "shm"
    assert (there.category, call.category) == ("bus", "")


def test_what_is_served_in_a_moment_counts_for_the_kv_manager_and_a_send_does_not() -> None:
    story = story_of(EVENTS)
    assert {span.name for span in story.spans if span.category == "kv"} == {
        *("prep_recv", "open_write", "close_write", "admit", "release")
    }


def test_ids_are_unique() -> None:
    spans = story_of(EVENTS).spans
    assert len({span.id for span in spans}) == len(spans)


def test_sequences_of_a_request_are_one_story() -> None:
    ids = itertools.count(1)
    writer = Writer("r", ids)
    root = next(ids)
    events = []
    for name in ("r", "r.1", "r.2"):
        sequence = [event for event in disaggregated(name, 5.0, ids=ids) if event.record.name != "http"]
        events += [
            replace(event, record=_with_parent(event, root)) if event.record.name == "Generate" else event
            for event in sequence
        ]
    writer.span("http", "frontend", 5.0, 8.0, 0, span=root)
    story = story_of([*events, *writer.events])
    assert [span.request_id for span in story.roots[0].children if span.kind == "call"] == ["r", "r.1", "r.2"]
    assert len(story.sub_requests) == 9
    assert story.num_tokens == 96


def _with_parent(event: Event, parent: int) -> TapRecord:
    record = event.record
    return msgspec.structs.replace(record, parent=parent) if record.what in (SENT, ENDED) else record


def test_ids_of_clients_that_end_in_numbers_are_requests_of_their_own() -> None:
    ids = itertools.count(1)
    stories = assemble([*disaggregated("run.1", 1.0, ids=ids), *disaggregated("run.2", 5.0, ids=ids)])
    assert list(stories) == ["run.1", "run.2"]
    assert all(len(story.sub_requests) == 3 for story in stories.values())


def test_a_request_under_way_has_no_end() -> None:
    story = story_of([event for event in EVENTS if event.time < 5.2])
    assert (story.end, story.jct_s) == (None, None)
    assert [span.name for span in story.roots] == ["read", "tokenise", "generate"]
    assert find(story, "remote_send").end is None
    # Neither the attempt nor the HTTP request is noted before it ends: their place is known by time.
    assert path(find(story, "remote_send")) == "remote_send < generate < generate"


def test_the_answer_that_a_killed_node_never_gave_leaves_a_call_without_end() -> None:
    story = story_of([event for event in EVENTS if event.node != "prefill"])
    call = find(story, "compute_kv")
    assert call.end is not None
    assert not call.children
    story = story_of([event for event in EVENTS if event.record.what != ENDED or event.record.name != "ComputeKv"])
    call = find(story, "compute_kv")
    assert call.end is None
    assert find(story, "compute_kv", "serve").end is not None


def test_a_call_whose_asking_side_is_lost_is_told_as_the_serving_side_saw_it() -> None:
    events = [event for event in EVENTS if event.record.name != "StartGenerate" or event.node == "decode"]
    story = story_of(events)
    call, serve = find(story, "start_generate"), find(story, "start_generate", "serve")
    assert (call.begin, call.end, call.actor, call.source) == (serve.begin, serve.end, "decode", "")
    assert path(serve) == "start_generate < start_generate < attempt < generate < generate < http"


def test_what_is_done_for_a_lost_call_hangs_at_the_actor_that_did_it() -> None:
    lost = {("attempt", SPAN)}
    story = story_of([event for event in EVENTS if (event.record.name, event.record.what) not in lost])
    assert path(find(story, "prep_recv")) == "prep_recv < generate < generate < http"
    story = story_of([event for event in EVENTS if event.record.name != "RemoteSend"])
    assert path(find(story, "compute_kv")) == "compute_kv < http"


def test_records_that_point_in_a_circle_still_make_a_story() -> None:
    writer = Writer("r", itertools.count(1))
    writer.span("attempt", "main", 1.0, 3.0, 2, span=1)
    writer.span("script", "main", 1.0, 2.0, 1, span=2)
    writer.span("wait", "main", 1.0, 1.5, 3, span=3)
    story = story_of(writer.events)
    assert sorted(span.name for root in story.roots for span in walk(root)) == ["attempt", "script", "wait"]


def test_a_tell_is_over_when_it_has_arrived() -> None:
    writer = Writer("r", itertools.count(1))
    writer.call("Finish", "kv", "decode", 1.0, 0)
    [span] = [span for span in story_of(writer.events).spans if span.kind == "call"]
    assert span.is_tell
    assert span.end == pytest.approx(1.0002)


def test_records_of_no_request_are_no_story() -> None:
    writer = Writer("", itertools.count(1))
    writer.call("GetMoment", "tracer.node", "", 1.0, 0)
    assert assemble(writer.events) == {}


def test_stories_come_in_the_order_of_their_begin() -> None:
    ids = itertools.count(1)
    events = [*disaggregated("b", 9.0, ids=ids), *disaggregated("a", 3.0, ids=ids), *whole("c", 6.0, ids=ids)]
    assert list(assemble(events)) == ["a", "c", "b"]


def test_times_of_a_record_are_moved_to_the_readers_clock_and_zeros_stay() -> None:
    [sent, ended] = [e.record for e in EVENTS if e.record.name == "PrepRecv" and e.record.what in (SENT, ENDED)]
    event = event_of(ended, "control", offset_s=100.0, error_s=0.001, wall_s=1e9)
    assert (event.time, event.begin, event.first) == (ended.time + 100, ended.begin + 100, 0.0)
    assert event.wall == ended.time + 100 + 1e9
    assert event_of(sent, "control", offset_s=100.0).begin == 0.0


@pytest.mark.parametrize(
    ("name", "verb"),
    [("PrepRecv", "prep_recv"), ("ComputeKv", "compute_kv"), ("GetKvStats", "get_kv_stats"), ("Admit", "admit")],
)
def test_messages_are_named_as_users_write_them(name: str, verb: str) -> None:
    assert verb_of(name) == verb


SYNTHETIC = [
    *disaggregated("r", 5.0, ids=(ids := itertools.count(1))),
    *disaggregated("r.1", 5.1, Shape(error="ActorDied: decode is dead", wait_blocks_s=0.1), ids=ids),
    *(event for event in whole("r.2", 5.2, ids=ids) if event.record.name != "http"),
]


@cache
def recorded() -> list[Event]:
    """What production actors noted of some requests at once."""

    async def main() -> list[Event]:
        costs = Simulation(seconds_per_step=0.01, seconds_per_prefill_token=0.001)
        layout, clock = SimulatedRunner(costs).layout, VirtualClock()
        async with running_fleet(layout=layout, hub=SimHub(1), clock=clock, simulated=costs, num_blocks=16) as fleet:
            many = SamplingParams(max_tokens=6, ignore_eos=True)
            prompts = [list(range(begin, begin + 100)) for begin in (0, 100, 200)]
            await asyncio.gather(
                *(fleet.generate(prompt, many, request_id=f"q{n}") for n, prompt in enumerate(prompts))
            )
            return [
                event_of(TapRecord(*finished(row)), node.name)
                for node in fleet.nodes.values()
                for request_id in node.trace.request_ids()
                for row in node.trace.of(request_id)
            ]

    return run_virtual(main)


def test_what_production_actors_note_are_whole_stories() -> None:
    stories = assemble(recorded())
    assert sorted(stories) == ["q0", "q1", "q2"]
    for story in stories.values():
        assert [root.name for root in story.roots] == ["generate"]
        assert {span.name for span in story.sub_requests} == {"prep_recv", "remote_send", "start_generate"}
        assert all(span.end is not None for span in story.spans)
    # The pool is small: some waited for blocks.
    assert "blocks" in {span.name for story in stories.values() for span in story.spans}


@pytest.mark.parametrize("is_recorded", [False, True])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_records_in_any_order_make_stories_in_which_nothing_is_twice(
    is_recorded: bool, data: st.DataObject
) -> None:
    rng = data.draw(st.randoms(use_true_random=False))
    share = data.draw(st.sampled_from([0.05, 0.5, 0.9, 0.98]))
    events = [event for event in (recorded() if is_recorded else SYNTHETIC) * 2 if rng.random() < share]
    rng.shuffle(events)
    stories = assemble(events)
    seen = []
    for story in stories.values():
        spans = [span for root in story.roots for span in walk(root)]
        assert {id(span) for span in spans} == {id(span) for span in story.spans}
        assert [span.begin for span in story.spans] == sorted(span.begin for span in story.spans)
        seen += spans
        for span in spans:
            assert span.end is None or span.end >= span.begin
            for child in span.children:
                if span.end is not None and child.end is not None:
                    assert span.begin <= child.begin
                    assert child.end <= span.end
    keys = [span.id for span in seen]
    assert len(keys) == len(set(keys))
    wanted = {event.record.span for event in events}
    assert wanted == {span.id for span in seen if span.kind in ("http", "call", "phase")}


@settings(deadline=None, max_examples=50)
@given(st.permutations(EVENTS))
def test_the_order_of_records_does_not_matter(events: list[Event]) -> None:
    assert _shape(story_of(events)) == _shape(story_of(EVENTS))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([SENT, RECEIVED, ANSWERED, ENDED]), unique=True, max_size=3))
def test_records_twice_change_nothing_and_lost_kinds_of_records_are_borne(lost: list[int]) -> None:
    events = [event for event in EVENTS if event.record.what not in lost]
    assert _shape(story_of(events + events)) == _shape(story_of(events))


def _shape(story: Story) -> list[tuple[object, ...]]:
    return [
        (span.id, span.kind, span.parent and span.parent.id, span.begin, span.end)
        for root in story.roots
        for span in walk(root)
    ]


def test_what_is_noted_for_the_sequence_is_put_into_the_run_of_the_script_it_was_done_in() -> None:
    writer = Writer("r", itertools.count(1))
    generate = writer.call("Generate", "main", "", 0.0, 0)
    for begin in (1.0, 3.0):
        call = writer.call("StartGenerate", f"d{begin}", "main", begin + 0.1, generate.span)
        writer.end(call, begin + 0.8)
        writer.span("attempt", "main", begin, begin + 1, generate.span, script="s")
    writer.span("wait", "main", 2.0, 3.0, generate.span)
    writer.end(generate, 4.1)
    story = story_of(writer.events)
    [serve] = [span for span in story.spans if span.kind == "serve" and span.name == "generate"]
    assert [span.name for span in serve.children] == ["attempt", "wait", "attempt"]
    runs = [span for span in serve.children if span.name == "attempt"]
    assert [child.actor for run in runs for child in run.children] == ["d1.0", "d3.0"]


def test_a_request_that_http_refused_has_the_error_of_what_it_asked_for() -> None:
    writer = Writer("r", itertools.count(1))
    root = next(writer.ids)
    generate = writer.call("Generate", "main", "frontend", 0.1, root)
    writer.end(generate, 0.2, error="QueueFull: 256 requests are in flight")
    writer.span("http", "frontend", 0.0, 0.3, 0, span=root, status=429)
    assert story_of(writer.events).error == "QueueFull: 256 requests are in flight"
    writer = Writer("r", itertools.count(1))
    writer.span("http", "frontend", 0.0, 0.3, 0, status=499)
    assert story_of(writer.events).error == "HTTP status 499"
