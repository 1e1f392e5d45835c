"""What is drawn, cell by cell: the model, a view and a size in, rows of text out."""

from collections.abc import Sequence

from synthetic_trace import Shape, disaggregated, load, whole

from callboard.actors.protocol import Entry
from callboard.bus import Address
from callboard.tools.trace.event import Event
from callboard.tools.trace.live.bars import colour_of
from callboard.tools.trace.live.chart import draw_chart
from callboard.tools.trace.live.detail import draw_detail
from callboard.tools.trace.live.lanes import Lanes
from callboard.tools.trace.live.model import Model
from callboard.tools.trace.live.painter import Chart
from callboard.tools.trace.live.panels import draw_head, draw_legend, draw_list, draw_waiting, split
from callboard.tools.trace.live.view import View

ID = "chatcmpl-4f1d22c0a9e34b11"


class Screen:
    """The view of some events at a moment."""

    def __init__(self, events: Sequence[Event], now: float) -> None:
        self.model, self.view, self.lanes = Model(), View(), Lanes()
        self.model.add(events)
        self.view.advance(self.view.shown(self.model), now)

    def chart(self, width: int, height: int) -> Chart:
        shown = self.view.shown(self.model)
        return draw_chart(self.model, self.view, shown, self.lanes, width, height)

    def text(self, width: int, height: int) -> str:
        return "\n".join(self.chart(width, height).canvas.text()).rstrip()

    def detail(self, request_id: str, width: int, height: int) -> str:
        canvas = draw_detail(self.model.requests[request_id], self.view.now, width, height)
        return "\n".join(canvas.text()).rstrip()


ONE = """\
          ─╷0 ──────────────╷500 ms ────────╷1 s ───────────╷1.5 s ─────────────
frontend     request 4f1d22c0 ────────────────────────────────────────────────
main        12──────3 start_generate ────────────────────────────────────────
            │       │
prefill     2 prompt│
└ kv-cpu0   2»─»─»»─»
            │       │
decode      │       3 ▏ decodes 31 tokens, 1.70 s
└ kv-cpu1   1« « ««"""

ONE_IN_WORDS = """\
Request chatcmpl-4f1d22c0a9e34b11: 312 prompt tokens, 32 generated, the first a…
1 prep_recv → decode, 0.7 ms: found 16 of 312 prompt tokens in its prefix cache,
  reserved room for [16, 312)
2 remote_send → prefill, 259 ms: computed 296 tokens in 250 ms, reused 16 from
  its cache; sent the KV of [16, 312), 1.2 MiB, into decode's pool through shm,
  layer by layer, done 2.6 ms after the last layer
3 start_generate → decode, 1.76 s: took over the reserved room, computed 1
  prompt token, generated 32 tokens, the first after 58 ms
time went to: computing 99%, queueing 0.3%, bus 0.2%, sending 0.1%, f…  x: more"""


def test_a_request_that_is_over_fills_the_screen() -> None:
    screen = Screen(disaggregated(ID, 100.0), 103.0)
    assert screen.text(80, 9) == ONE
    assert screen.detail(ID, 80, 10) == ONE_IN_WORDS


def test_where_rows_are_few_the_sentences_come_first() -> None:
    screen = Screen(disaggregated(ID, 100.0), 103.0)
    assert screen.detail(ID, 80, 8).splitlines() == ONE_IN_WORDS.splitlines()[:8]
    assert screen.detail(ID, 80, 7).splitlines() == [
        *ONE_IN_WORDS.splitlines()[:6],
        "… and 1 more: x explains all",
    ]
    assert screen.detail(ID, 80, 2).splitlines() == [ONE_IN_WORDS.splitlines()[0], "… and 2 more: x explains all"]
    assert "█" in screen.detail(ID, 80, 14)


def test_with_room_lanes_stand_apart_and_arrows_have_heads() -> None:
    rows = Screen(disaggregated(ID, 100.0), 103.0).text(120, 13).splitlines()
    assert [row.split(" ")[0] for row in rows[1::2]][:5] == ["frontend", "main", "prefill", "└", "decode"]
    assert rows[4].count("│") == 2  # prep_recv and start_generate leave the router.
    assert rows[8].count("▼") == 1  # start_generate is at decode.
    assert rows[10].count("▼") == 1  # prep_recv is at decode's KV manager.
    assert rows[8].index("▼") == rows[9].index("3")


def test_what_is_under_way_is_drawn_up_to_now_and_said_to_be_so() -> None:
    events = [event for event in disaggregated(ID, 100.0) if event.time < 101.0]
    screen = Screen(events, 101.0)
    rows = screen.text(80, 9).splitlines()
    assert rows[0].endswith(" now")
    assert [row[-1] for row in rows if row.startswith(("frontend", "main", "decode"))] == ["▸"] * 3
    assert "decodes ..." in next(row for row in rows if row.startswith("decode"))
    assert "3 start_generate → decode, 738 ms: generates tokens ..." in screen.detail(ID, 80, 12)
    assert "Request chatcmpl-4f1d22c0a9e34b11: 312 prompt tokens, running for 1.00 s" in screen.detail(ID, 80, 12)


def test_zoomed_in_the_shortest_sub_request_has_its_name_and_place() -> None:
    screen = Screen(disaggregated(ID, 100.0), 103.0)
    for _ in range(9):
        screen.view.zoom(0.5, screen.model.requests[ID])
    rows = {row.split("  ")[0]: row for row in screen.text(80, 9).splitlines()}
    assert "1 prep_recv ──2──" in rows["main"]
    assert "1     prep_recv" in rows["└ kv-cpu1"]
    assert "tokenise 1.8 ms" in rows["frontend"]
    assert rows["└ kv-cpu1"].index("1") < rows["└ kv-cpu0"].index("2")


def test_a_queue_looks_other_than_work() -> None:
    screen = Screen(disaggregated(ID, 100.0, Shape(queue_s=0.5, wait_blocks_s=0.3)), 105.0)
    rows = {row.split("  ")[0]: row for row in screen.text(120, 9).splitlines()}
    assert "2░queue 500 ms░" in rows["prefill"]
    assert "1░" in rows["└ kv-cpu1"]
    chart = screen.chart(120, 9)
    y = next(i for i, row in enumerate(chart.canvas.text()) if row.startswith("prefill"))
    styles = {chart.canvas.at(x, y) for x in range(11, 60)}
    assert any(char == " " and " on " in style for char, style in styles)  # Work is a filled bar.
    assert not any(char == "░" and " on " in style for char, style in styles)
    assert "after waiting 300 ms for free blocks" in screen.detail(ID, 300, 12)
    assert "after 500 ms in the queue" in screen.detail(ID, 300, 12)


def test_requests_at_the_same_time_have_rows_and_colours_of_their_own() -> None:
    events = [*disaggregated("a", 100.0), *disaggregated("b", 100.2), *disaggregated("c", 100.4)]
    screen = Screen(events, 103.0)
    chart = screen.chart(100, 20)
    text = chart.canvas.text()
    top = next(i for i, row in enumerate(text) if row.startswith("decode"))
    assert [row[9:].strip(" │3▏") for row in text[top : top + 3]] == ["decodes 31 tokens, 1.70 s"] * 3
    assert len({colour_of(tracked) for tracked in screen.model.requests.values()}) == 3
    found = {chart.request_at(60, y) for y in range(top, top + 3)}
    assert found == {"a", "b", "c"}
    assert chart.request_at(60, 0) is None


def test_a_request_keeps_its_row_and_colour_while_time_goes_on() -> None:
    events = sorted(
        [*disaggregated("a", 100.0), *disaggregated("b", 100.2), *disaggregated("c", 102.1)], key=lambda e: e.time
    )
    screen, places = Screen([], 100.0), {}
    for event in events:
        screen.model.add([event])
        screen.view.advance(screen.view.shown(screen.model), event.time)
        chart = screen.chart(80, 20)
        for tracked in screen.model.requests.values():
            for unit in tracked.units.values():
                assert places.setdefault((tracked.id, unit.number), unit.slot) == unit.slot
        assert chart.canvas.text()
    assert {place for (request, _), place in places.items() if request == "a"} == {0}


def test_more_bars_than_rows_become_a_skyline_and_the_selected_one_stays() -> None:
    events = [event for event in load(100, rate=20.0, at=100.0) if event.time < 103.0]
    screen = Screen(events, 103.0)
    rows = screen.text(80, 7).splitlines()
    assert len(rows) == 7
    decode = next(row for row in rows if row.startswith("decode"))
    assert set("▁▂▃▄▅▆▇█") & set(decode)
    [*_, chosen, _, _] = [each for each in screen.view.shown(screen.model) if each.is_over]
    screen.view.choose(chosen)
    rows = screen.text(80, 7).splitlines()
    assert f"request {chosen.id[:8]}" in rows[1]
    assert "3" in next(row for row in rows if row.startswith("main"))


def test_a_fleet_larger_than_the_screen_shows_who_is_busy_and_counts_the_others() -> None:
    entries = {
        f"e{i}": Entry(f"e{i}", "engine", Address(f"e{i}", "ipc://x", f"e{i}"), roles=("decode",)) for i in range(40)
    }
    screen = Screen(disaggregated(ID, 100.0), 103.0)
    screen.lanes.know(entries)
    rows = screen.text(80, 12).splitlines()
    assert {"frontend", "main", "prefill", "decode"} <= {row.split(" ")[0] for row in rows}
    assert rows[-1] == "and 36 actors more, with no room here"


def test_an_idle_fleet_shows_its_actors_before_anything_happened() -> None:
    manager = Address("kv-cpu0", "ipc://x", "kv-cpu0")
    entries = {
        "decode": Entry("decode", "engine", Address("decode", "ipc://x", "decode"), roles=("decode",), manager=manager),
        "kv-cpu0": Entry("kv-cpu0", "kv_manager", manager),
        "main": Entry("main", "router", Address("control", "ipc://x", "main")),
        "ping": Entry("ping", "ping", Address("ping", "ipc://x", "ping")),
    }
    screen = Screen([], 100.0)
    screen.lanes.know(entries)
    assert [row.strip() for row in screen.text(80, 4).splitlines()[1:]] == ["main", "decode", "└ kv-cpu0"]
    assert "waiting for requests ..." in "\n".join(draw_waiting("default", 80, 8, is_filtered=False).text())
    assert 'callboard chat "What is a callboard?"' in "\n".join(
        draw_waiting("default", 80, 8, is_filtered=False).text()
    )


def test_one_engine_alone_has_one_sub_request() -> None:
    screen = Screen(whole("w", 100.0), 103.0)
    assert "1 start_generate" in screen.text(80, 7)
    assert screen.detail("w", 120, 4).splitlines()[1] == (
        "1 start_generate → decode, 1.96 s: computed 296 prompt tokens, generated 32 tokens, the first after 255 ms"
    )


def test_a_failure_says_where_and_why() -> None:
    screen = Screen(disaggregated("a", 100.0, Shape(error="ActorDied: decode is dead")), 103.0)
    assert screen.text(80, 7).splitlines()[1].endswith("✗")
    [told] = [row for row in screen.detail("a", 100, 12).splitlines() if row.startswith("3 start_generate → decode")]
    assert told.endswith("ms: failed: ActorDied: decode is dead")
    shown = screen.view.shown(screen.model)
    rows, listed = draw_list(screen.model, screen.view, shown, 100, 3)
    assert listed == ["a"]
    assert rows.text()[1].split()[:2] == ["a", "failed"]


def test_what_comes_from_elsewhere_cannot_reach_the_terminal() -> None:
    evil = "\x1b[2Jx\u202e漢"
    screen = Screen(disaggregated(evil, 100.0, Shape(model=evil, error=evil)), 103.0)
    shown = screen.view.shown(screen.model)
    canvases = [
        screen.chart(100, 9).canvas,
        draw_list(screen.model, screen.view, shown, 140, 3)[0],
        draw_detail(shown[0], 103.0, 100, 12),
    ]
    drawn = "".join(row for canvas in canvases for row in canvas.text())
    assert drawn.isprintable()
    assert "漢" not in drawn


def test_every_size_of_a_terminal_is_filled_and_never_overfilled() -> None:
    events = [event for event in load(40, rate=10.0, at=100.0) if event.time < 103.0]
    screen = Screen(events, 103.0)
    shown = screen.view.shown(screen.model)
    for width, height in [(1, 1), (20, 5), (40, 10), (80, 24), (100, 30), (200, 50), (400, 120)]:
        sizes = split(height, 6, 20, len(shown))
        assert min(sizes.chart, sizes.legend, sizes.list, sizes.detail) >= 0
        assert sizes.chart + sizes.legend + sizes.list + sizes.detail == max(height - 2, 0)
        canvases = [
            screen.chart(width, sizes.chart).canvas,
            draw_list(screen.model, screen.view, shown, width, sizes.list)[0],
            draw_detail(shown[-1], 103.0, width, sizes.detail),
            draw_legend(width, sizes.legend),
            draw_head(screen.model, screen.view, fleet="f", ended="", num_actors=6, width=width),
        ]
        for canvas in canvases:
            assert all(len(row) <= width for row in canvas.text())
            assert all(sum(len(segment.text) for segment in row) == width for row in canvas.rows())


def test_losses_and_who_came_and_went_stand_in_the_head() -> None:
    screen = Screen(disaggregated(ID, 100.0), 103.0)

    def head() -> str:
        [row] = draw_head(screen.model, screen.view, fleet="demo", ended="", num_actors=6, width=120).text()
        return row

    assert head() == "fleet demo · 6 actors · 1 request · following"
    screen.model.say("decode died: what it had noted and not told is lost", at=103.0)
    assert head().endswith("decode died: what it had noted and not told is lost")
    screen.view.advance([], 200.0)
    assert head().endswith("following")
    screen.model.say("7 records lost", at=200.0, num_lost=7)
    screen.view.advance([], 300.0)
    assert head().endswith("7 records lost")
