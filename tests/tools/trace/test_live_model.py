"""What the live view knows: bounded, in any order, and nothing that somebody looks at is dropped."""

import gc
import os
import random
from pathlib import Path

import pytest
from synthetic_trace import Shape, again, disaggregated, whole

from callboard.bus.taps import ANSWERED, RECEIVED
from callboard.tools.trace.live.model import Model
from callboard.tools.trace.live.view import View
from callboard.tools.trace.live.wanted import Wanted

NUM_RECORDS = int(os.environ.get("CALLBOARD_TEST_RECORDS", "250000"))
"""A million: CALLBOARD_TEST_RECORDS=1000000."""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


ID = "chatcmpl-4f1d22c0a9e34b11"


def test_records_in_any_order_and_twice_tell_the_same_story() -> None:
    events = disaggregated(ID, 100.0)
    straight, shuffled = Model(), Model()
    straight.add(events)
    twice = events + events
    random.Random(5).shuffle(twice)
    shuffled.add(twice)
    one, other = straight.requests[ID], shuffled.requests[ID]
    assert len(other.events) == len(events)
    assert other.is_over
    assert other.begin == one.begin
    assert other.last == one.last
    assert {(u.actor, u.name, u.begin, u.end) for u in other.units.values()} == {
        (u.actor, u.name, u.begin, u.end) for u in one.units.values()
    }
    assert [s.name for s in other.story().sub_requests] == ["prep_recv", "remote_send", "start_generate"]


def test_the_oldest_requests_go_first_and_are_not_tracked_again_by_late_records() -> None:
    model = Model(keep=10)
    late = disaggregated("0", 1.0)
    model.add(late[:-3])
    for index in range(1, 30):
        model.add(disaggregated(f"{index}", 1.0 + index))
    model.add(late[-3:])
    assert list(model.requests) == [f"{index}" for index in range(20, 30)]
    assert model.num_seen == 30
    assert model.horizon == pytest.approx(20.0)


def test_what_failed_and_what_is_looked_at_outlives_its_time() -> None:
    model = Model(keep=10)
    model.add(disaggregated("failed", 1.0, Shape(error="ActorDied: decode is dead")))
    model.add(disaggregated("watched", 2.0))
    model.pinned = "watched"
    for index in range(30):
        model.add(disaggregated(f"{index}", 10.0 + index))
    assert {"failed", "watched"} <= set(model.requests)
    assert len(model.requests) == 10


def test_failures_alone_cannot_fill_the_memory() -> None:
    model = Model(keep=20)
    for index in range(200):
        model.add(disaggregated(f"{index}", 10.0 + index, Shape(error="ActorDied: decode is dead")))
    assert len(model.requests) == 20
    assert list(model.requests)[-1] == "199"


def test_a_still_picture_keeps_its_requests_and_counts_what_it_had_no_room_for() -> None:
    model, view = Model(keep=10), View()
    for index in range(10):
        model.add(disaggregated(f"{index}", 1.0 + index))
    view.pause(model)
    for index in range(10, 50):
        model.add(disaggregated(f"{index}", 1.0 + index))
    assert [each.id for each in view.shown(model)] == [f"{index}" for index in range(10)]
    assert len(model.requests) == 20
    assert model.num_skipped == 30
    view.pause(model)
    assert len(model.requests) == 10
    assert model.num_skipped == 0


def test_a_request_that_is_under_way_is_over_with_its_last_record_and_not_before() -> None:
    events = disaggregated(ID, 100.0)
    model = Model()
    for event in events[:-3]:
        model.add([event])
        assert model.requests[ID].is_running(event.time)
    model.add(events[-3:])
    assert not model.requests[ID].is_running(events[-1].time)
    assert all(unit.end is not None for unit in model.requests[ID].units.values())


def test_a_lost_end_does_not_keep_a_request_running_for_ever() -> None:
    model = Model()
    model.add(disaggregated(ID, 100.0)[:20])
    tracked = model.requests[ID]
    assert tracked.is_running(tracked.last + 60)
    assert not tracked.is_running(tracked.last + 3600)
    [unit] = [each for each in tracked.units.values() if each.name == "RemoteSend"]
    assert tracked.end_of(unit, tracked.last + 3600) == tracked.last


@pytest.mark.parametrize("error", ["", "ActorDied: decode is dead"])
def test_what_a_node_asks_for_that_nobody_follows_is_over_once_the_router_has_answered(error: str) -> None:
    # As a replay or a script of somebody's does, over the bus.
    events = [each for each in disaggregated(ID, 100.0, Shape(error=error)) if each.record.name != "http"]
    events = [each for each in events if each.record.name != "Generate" or each.record.what in (RECEIVED, ANSWERED)]
    [answered] = [each for each in events if each.record.name == "Generate" and each.record.what == ANSWERED]
    for order in (events, [answered, *events], [*events, answered], events[::-1]):
        model = Model()
        model.add(order)
        tracked = model.requests[ID]
        assert not tracked.is_running(tracked.last)
        assert tracked.is_over
        assert tracked.error == error


def test_what_only_engines_remember_is_under_way_no_longer_than_they_are_at_it() -> None:
    # The node of frontend and router was started anew since.
    events = [each for each in disaggregated(ID, 100.0) if each.node not in ("control", "client")]
    model = Model()
    model.add(events)
    assert not model.requests[ID].is_running(100.5)
    model = Model()
    model.add(each for each in events if each.record.what != ANSWERED)
    assert model.requests[ID].is_running(100.5)


def test_with_the_node_that_asked_for_it_a_request_is_over_and_with_others_it_is_not() -> None:
    model = Model()
    model.add(disaggregated("under way", 100.0)[:20])
    model.add(disaggregated("done", 90.0))
    model.lose("prefill", "prefill died")
    assert model.requests["under way"].is_running(101.0)
    model.lose("control", "control died")
    assert not model.requests["under way"].is_running(101.0)
    assert model.requests["under way"].error == "control died"
    assert model.requests["done"].error == ""


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (Wanted(), {"aa", "bb", "cc"}),
        (Wanted("aa"), {"aa"}),
        (Wanted("kv-cpu0"), {"aa", "cc"}),
        (Wanted("remote_send"), {"aa", "cc"}),
        (Wanted("Round"), {"bb"}),
        (Wanted("disagg smollm2"), {"aa", "cc"}),
        (Wanted("actordied"), {"cc"}),
        (Wanted(only_errors=True), {"cc"}),
        (Wanted(actor="prefill"), {"aa", "cc"}),
        (Wanted(verb="prep_recv"), {"aa", "cc"}),
        (Wanted(request="b"), {"bb"}),
        (Wanted(slower_s=3.0), {"bb"}),
    ],
)
def test_only_what_is_wanted_is_shown(wanted: Wanted, found: set[str]) -> None:
    model = Model()
    model.add(disaggregated("aa", 1.0))
    model.add(whole("bb", 2.0, Shape(num_tokens=64)))
    model.add(disaggregated("cc", 3.0, Shape(error="ActorDied: decode is dead")))
    view = View(wanted)
    assert {each.id for each in view.shown(model)} == found


def test_records_pass_through_flat_memory_however_many() -> None:
    model, view, one = Model(), View(), disaggregated("", 0.0)
    sizes = []
    for index in range(NUM_RECORDS // len(one) + 1):
        model.add(again(one, f"{index}", index / 100))
        if index % 500 == 499:
            view.advance(view.shown(model), model.last)
            assert [each.story().num_tokens for each in list(model.requests.values())[-20:-3]] == [32] * 17
            gc.collect()
            sizes.append(resident_bytes())
    assert model.num_events > NUM_RECORDS
    assert len(model.requests) == 500
    assert max(sizes) - sizes[4] < 15 * 2**20
