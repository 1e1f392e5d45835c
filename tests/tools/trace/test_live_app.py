"""The live view in a terminal of Textual's own: keys, the mouse, sizes, and how often it draws."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable

import pytest
from synthetic_trace import Shape, disaggregated, load
from textual.pilot import Pilot
from waiting import PATIENCE_S, told

from callboard.actors.protocol import Entry
from callboard.bus import LinkLost
from callboard.tools.trace.event import Event
from callboard.tools.trace.live.app import LiveView
from callboard.tools.trace.live.pages import Page
from callboard.tools.trace.live.wanted import Wanted
from callboard.tools.trace.notice import Notice

Pages = Pilot[None]


class Stream:
    """What a fleet would tell: it is put here."""

    def __init__(self, *batches: Iterable[Event | Notice]) -> None:
        self.name = "demo"
        self.entries: dict[str, Entry] = {}
        self._queue: asyncio.Queue[list[Event | Notice] | BaseException | None] = asyncio.Queue()
        for batch in batches:
            self.put(batch)

    def put(self, batch: Iterable[Event | Notice]) -> None:
        self._queue.put_nowait(list(batch))

    def fail(self, error: BaseException) -> None:
        self._queue.put_nowait(error)

    async def __aiter__(self) -> AsyncIterator[list[Event | Notice]]:
        while (batch := await self._queue.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            yield batch


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def text(app: LiveView, *panels: str) -> str:
    names = panels or ("head", "chart", "legend", "list", "detail")
    return "\n".join(line for name in names for line in app.panel(name).text())


async def until(pilot: Pages, condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > ends:
            raise AssertionError(told(condition, PATIENCE_S) + f"\non the screen:\n{text(pilot.app)}")
        await pilot.pause(0.02)


def app_of(*requests: Iterable[Event], now: float = 200.0, **options: object) -> LiveView:
    return LiveView(Stream(*requests), clock=Clock(now), **options)  # type: ignore[arg-type]


async def test_nothing_happened_yet_says_so_and_what_to_type() -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "waiting for requests ..." in text(app, "detail"))
        assert 'callboard chat --fleet demo "What is a callboard?"' in text(app)
        assert "fleet demo · 0 actors · 0 requests · following" in text(app, "head")


@pytest.mark.parametrize("size", [(80, 24), (200, 50)])
async def test_a_newcomer_reads_from_the_screen_what_the_three_verbs_did(size: tuple[int, int]) -> None:
    app = app_of(disaggregated("chatcmpl-4f1d22c0a9e34b11", 100.0))
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: "4f1d22c0" in text(app, "list"))
        screen = re.sub(r"\s+", " ", text(app, "detail"))
        assert "1 prep_recv → decode, 0.7 ms: found 16 of 312 prompt tokens in its prefix cache" in screen
        assert "2 remote_send → prefill, 259 ms: computed 296 tokens in 250 ms" in screen
        assert "1.2 MiB, into decode's pool through shm, layer by layer" in screen
        assert "3 start_generate → decode, 1.76 s: took over the reserved room" in screen
        assert "generated 32 tokens, the first after 58 ms" in screen
        assert "prep_recv reserves room" in text(app, "legend") or "prep_recv: look up" in text(app, "legend")
        [row] = [line for line in text(app, "list").splitlines() if "4f1d22c0" in line]
        assert row.split()[:9] == ["4f1d22c0", "done", "321", "ms", "2.03", "s", "312", "32", "smollm2-135m"]
        footer = " ".join(str(key.render()) for key in app.query("FooterKey"))
        for key in ("explain", "pause", "follow", "filter", "errors", "help", "quit"):
            assert key in footer


async def test_up_and_down_select_and_the_chart_shows_all_of_it() -> None:
    app = app_of(disaggregated("aa", 100.0), disaggregated("bb", 150.0))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "Request bb" in text(app, "detail"))
        await pilot.press("down")
        assert "Request aa" in text(app, "detail")
        assert "request aa" in text(app, "chart")
        assert "f: follow again" in text(app, "head")
        await pilot.press("f")
        assert "Request bb" in text(app, "detail")
        assert "following" in text(app, "head")


async def test_a_click_selects_in_the_list_and_in_the_chart() -> None:
    app = app_of(disaggregated("aa", 100.0), disaggregated("bb", 100.5))
    async with app.run_test(size=(100, 30)) as pilot:
        await until(pilot, lambda: "Request bb" in text(app, "detail"))
        await until(pilot, lambda: app.panel("list").size.height == 3)
        await pilot.click("#list", offset=(4, 2))
        assert "Request aa" in text(app, "detail")
        y = next(y for y, line in enumerate(app.panel("chart").text()) if "request bb" in line)
        x = app.panel("chart").text()[y].index("request bb")
        await pilot.click("#chart", offset=(x + 2, y))
        assert "Request bb" in text(app, "detail")


async def test_paused_the_picture_stands_still_and_goes_on_from_where_things_are() -> None:
    app = app_of([event for event in disaggregated("aa", 100.0) if event.time < 100.5], now=100.5)
    stream, clock = app.source, app.clock
    assert isinstance(stream, Stream)
    assert isinstance(clock, Clock)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "Request aa" in text(app, "detail"))
        await pilot.press("space")
        assert "PAUSED" in text(app, "head")
        before = text(app, "chart", "list", "detail")
        stream.put(disaggregated("bb", 101.0))
        clock.now = 104.0
        await until(pilot, lambda: app.model.num_seen == 2)
        await pilot.pause(0.3)
        assert text(app, "chart", "list", "detail") == before
        await pilot.press("space")
        await until(pilot, lambda: "bb" in text(app, "list"))


async def test_a_filter_is_typed_and_taken_away() -> None:
    app = app_of(disaggregated("aa", 100.0), disaggregated("bb", 150.0))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "Request bb" in text(app, "detail"))
        await pilot.press("slash", *"aa")
        assert app.view.wanted.text == "aa"
        assert "bb" not in text(app, "list")
        assert 'only "aa"' in text(app, "head")
        await pilot.press("enter", "slash", "q", "x", "e", "space")
        assert app.view.wanted.text == "qxe "  # Keys are letters here, in place of what was there.
        assert "No request is shown" in text(app, "detail")
        await pilot.press("escape")
        assert "bb" in text(app, "list")
        assert app.is_running


async def test_errors_only_leaves_those_that_failed() -> None:
    app = app_of(disaggregated("aa", 100.0, Shape(error="ActorDied: decode is dead")), disaggregated("bb", 150.0))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "bb" in text(app, "list"))
        await pilot.press("e")
        assert "bb" not in text(app, "list")
        assert "ActorDied: decode is dead" in text(app, "detail")
        await pilot.press("e")
        assert "bb" in text(app, "list")


@pytest.mark.parametrize("key", ["x", "enter"])
async def test_explain_says_where_the_time_went_and_comes_back(key: str) -> None:
    app = app_of(disaggregated("aa", 100.0))
    async with app.run_test(size=(100, 30)) as pilot:
        await until(pilot, lambda: "Request aa" in text(app, "detail"))
        await pilot.press(key)
        page = app.screen
        assert isinstance(page, Page)
        assert "WHERE IT WENT" in page.text.plain
        assert "remote_send" in page.text.plain
        await pilot.resize_terminal(80, 24)
        await pilot.pause()
        await pilot.press("down", "pagedown", "escape")
        assert not isinstance(app.screen, Page)
        assert "Request aa" in text(app, "detail")


async def test_help_names_the_marks_the_verbs_the_keys_and_the_notices() -> None:
    app = app_of([Notice("decode died: what it had noted and not told is lost", "died", "decode", time=199.0)])
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "decode died" in text(app, "head"))
        await pilot.press("question_mark")
        page = app.screen
        assert isinstance(page, Page)
        for word in ("prep_recv", "remote_send", "start_generate", "waits in a queue", "space", "decode died"):
            assert word in page.text.plain


async def test_it_fits_any_size_at_any_moment() -> None:
    app = app_of([event for event in load(60, rate=20.0, at=100.0) if event.time < 103.0], now=103.0)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: app.model.num_seen > 40)
        for width, height in [(200, 50), (40, 12), (20, 6), (5, 3), (120, 40), (80, 24)]:
            await pilot.resize_terminal(width, height)
            await pilot.pause()
            await until(pilot, lambda width=width: app.size.width == width)  # type: ignore[misc]
            await until(pilot, lambda: all(len(line) <= app.size.width for line in text(app).splitlines()))
        await until(pilot, lambda: "2 remote_send → prefill" in text(app))
        assert sum(panel.size.height for panel in app.query("Panel")) + 1 == 24


async def test_an_idle_screen_is_not_drawn_again() -> None:
    app = app_of(disaggregated("aa", 100.0))
    clock = app.clock
    assert isinstance(clock, Clock)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "Request aa" in text(app, "detail"))
        await pilot.pause(0.3)
        before = [app.panel(name).num_repaints for name in ("head", "chart", "legend", "list", "detail")]
        num_paints = app.num_paints
        for _ in range(10):
            clock.now += 0.1
            await pilot.pause(0.1)
        assert app.num_paints == num_paints
        assert [app.panel(name).num_repaints for name in ("head", "chart", "legend", "list", "detail")] == before


async def test_however_much_comes_it_draws_ten_times_a_second_at_most() -> None:
    app = app_of()
    stream, clock = app.source, app.clock
    assert isinstance(stream, Stream)
    assert isinstance(clock, Clock)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        loop = asyncio.get_running_loop()
        begun, num_paints, batch = loop.time(), app.num_paints, []
        for event in load(600, rate=1000.0, at=200.0):
            batch.append(event)
            if len(batch) == 100:
                clock.now = event.time
                stream.put(batch)
                batch = []
                await asyncio.sleep(0)
        await until(pilot, lambda: app.model.num_seen > 590)
        assert app.num_paints - num_paints <= 10 * (loop.time() - begun) + 2
        assert len(app.model.requests) == 500


async def test_the_end_of_the_fleet_is_told_and_what_it_did_can_still_be_read() -> None:
    app = app_of(disaggregated("aa", 100.0), [Notice("fleet demo has ended", "ended", time=110.0)])
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "fleet demo has ended" in text(app, "head"))
        assert "start_generate" in text(app, "detail")


async def test_a_broken_link_is_told_and_does_not_end_the_view() -> None:
    app = app_of(disaggregated("aa", 100.0))
    stream = app.source
    assert isinstance(stream, Stream)
    async with app.run_test(size=(100, 24)) as pilot:
        await until(pilot, lambda: "Request aa" in text(app, "detail"))
        stream.fail(LinkLost("control"))
        await until(pilot, lambda: "cut off" in text(app, "head"))
        await pilot.press("x")
        assert isinstance(app.screen, Page)


async def test_lost_records_are_counted() -> None:
    app = app_of(
        disaggregated("aa", 100.0),
        [Notice("120 records of decode lost: they came faster than they were read here", "lost", "decode", 120, 150.0)],
    )
    async with app.run_test(size=(100, 24)) as pilot:
        await until(pilot, lambda: "120 records lost" in text(app, "head"))


async def test_the_past_can_be_cut_to_the_last_requests() -> None:
    app = app_of(
        disaggregated("aa", 100.0),
        disaggregated("cc", 120.0),
        disaggregated("bb", 110.0),
        [Notice("now following demo: 5 nodes", "following")],
        num_past=2,
    )
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: [each.id for each in app.view.shown(app.model)] == ["bb", "cc"])


async def test_what_the_command_line_asks_for_is_all_that_is_shown() -> None:
    app = app_of(disaggregated("aa", 100.0), disaggregated("bb", 110.0), wanted=Wanted(request="aa"))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "Request aa" in text(app, "detail"))
        assert "bb" not in text(app, "list")


@pytest.mark.parametrize("key", ["q", "ctrl+c"])
async def test_leaving_leaves(key: str) -> None:
    app = app_of(disaggregated("aa", 100.0))
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press(key)
        await pilot.pause()
    assert app.return_code == 0
