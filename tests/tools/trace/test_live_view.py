"""What is looked at: which request is selected, and which stretch of time is on the screen."""

import pytest
from synthetic_trace import disaggregated

from callboard.tools.trace.live.model import Model
from callboard.tools.trace.live.view import View
from callboard.tools.trace.live.words import took


def see(model: Model, view: View, now: float) -> None:
    view.advance(view.shown(model), now, horizon=model.horizon)


def test_time_stands_still_when_nothing_happens() -> None:
    model, view = Model(), View()
    model.add(disaggregated("a", 100.0))
    see(model, view, 103.0)
    before = view.window(70, model.requests["a"])
    see(model, view, 500.0)
    assert view.window(70, model.requests["a"]) == before
    assert before.cell(100.0) == 1
    assert 66 <= before.cell(102.026) <= 68


def test_while_something_runs_the_window_ends_now_and_moves_by_whole_cells() -> None:
    model, view = Model(), View()
    model.add([event for event in disaggregated("a", 100.0) if event.time < 100.5])
    see(model, view, 100.9)
    first = view.window(70, None)
    cell = (first.end - first.begin) / 70
    ends = set()
    for step in range(100):
        see(model, view, 100.9 + step * cell / 50)
        window = view.window(70, None)
        ends.add(round((window.end - first.end) / cell, 6))
        assert window.begin <= 100.0
        assert -1e-9 <= window.end - view.now <= cell * 1.001
    assert ends == {0.0, 1.0, 2.0} or ends == {0.0, 1.0, 2.0, 3.0}


def test_requests_of_the_past_come_in_any_order_and_the_latest_is_selected() -> None:
    model, view = Model(), View()
    for name, begin in (("b", 200.0), ("c", 300.0), ("a", 100.0)):
        model.add(disaggregated(name, begin))
    see(model, view, 303.0)
    assert [each.id for each in view.shown(model)] == ["a", "b", "c"]
    assert view.selected == "c"


def test_what_is_read_is_not_taken_away_by_the_next_request() -> None:
    model, view = Model(), View()
    model.add(disaggregated("a", 100.0))
    see(model, view, 102.1)
    model.add(disaggregated("b", 102.2)[:10])
    see(model, view, 102.5)
    assert view.selected == "a"
    see(model, view, 104.5)
    assert view.selected == "b"


def test_a_choice_stays_whatever_comes_until_it_is_given_up() -> None:
    model, view = Model(), View()
    model.add(disaggregated("a", 100.0))
    model.add(disaggregated("b", 110.0))
    see(model, view, 113.0)
    view.move(model, 1)
    assert (view.selected, view.mode) == ("a", "fit")
    model.add(disaggregated("c", 120.0))
    see(model, view, 130.0)
    assert view.selected == "a"
    assert view.begin < 100.0 < 102.0 < view.end < 103.0
    view.move(model, 100)
    assert view.selected == "a"
    view.move(model, -100)
    assert view.selected == "c"
    view.follow(model)
    see(model, view, 131.0)
    assert (view.selected, view.mode) == ("c", "follow")


def test_the_choice_moves_on_when_the_filter_leaves_nothing_of_it() -> None:
    model, view = Model(), View()
    model.add(disaggregated("aa", 100.0))
    model.add(disaggregated("bb", 110.0))
    see(model, view, 113.0)
    view.want(text="aa")
    see(model, view, 113.1)
    assert view.selected == "aa"
    view.want(text="no such thing")
    see(model, view, 113.2)
    assert view.selected == ""


def test_zooming_keeps_where_the_request_begins_and_scrolling_goes_by_shares() -> None:
    model, view = Model(), View()
    model.add(disaggregated("a", 100.0))
    see(model, view, 103.0)
    tracked = model.requests["a"]
    cell = view.window(100, tracked).cell(100.0)
    view.zoom(0.1, tracked)
    assert view.window(100, tracked).cell(100.0) == cell
    length = view.end - view.begin
    begin = view.begin
    view.scroll(0.25)
    assert view.begin == pytest.approx(begin + length / 4)
    see(model, view, 200.0)
    assert view.begin == pytest.approx(begin + length / 4)


def test_zooming_has_an_end_in_both_directions() -> None:
    model, view = Model(), View()
    model.add(disaggregated("a", 100.0))
    see(model, view, 103.0)
    for _ in range(100):
        view.zoom(0.5, model.requests["a"])
    assert view.end - view.begin == pytest.approx(1e-4)
    for _ in range(100):
        view.zoom(2.0, model.requests["a"])
    assert view.end - view.begin == pytest.approx(3000.0)


def test_nothing_moves_while_paused_and_all_is_there_afterwards() -> None:
    model, view = Model(), View()
    model.add([event for event in disaggregated("a", 100.0) if event.time < 100.5])
    see(model, view, 100.5)
    view.pause(model)
    before = (view.begin, view.end, view.selected, view.now)
    model.add(disaggregated("b", 101.0))
    see(model, view, 110.0)
    assert (view.begin, view.end, view.selected, view.now) == before
    assert [each.id for each in view.shown(model)] == ["a"]
    view.pause(model)
    see(model, view, 110.0)
    assert [each.id for each in view.shown(model)] == ["a", "b"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 ms"),
        (0.00078, "0.8 ms"),
        (0.0412, "41 ms"),
        (0.9999, "1.00 s"),
        (1.924, "1.92 s"),
        (61.24, "61.2 s"),
        (3600.0, "60 min"),
    ],
)
def test_durations_are_as_people_write_them(seconds: float, text: str) -> None:
    assert took(seconds) == text
