"""``callboard top``: frames of what happened between two looks, live, in a pipe, as JSON, and until a fleet ends."""

import asyncio
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from rich.console import Console
from served_fleet import ServedFleet
from waiting import PATIENCE_S

from callboard.actors.protocol import Counters, Entry, Load
from callboard.actors.stats_protocol import FrontendStats, ModelStats, Percentiles
from callboard.bus import Address
from callboard.tools import top_watch
from callboard.tools.observe_commands import SORTS
from callboard.tools.running import open_fleet
from callboard.tools.top_app import TopApp
from callboard.tools.top_frame import Frame, PoolRow, Sample, frame_of, in_order
from callboard.tools.top_view import BAR_WIDTH, pool_bar, sparkline, view

Eventually = Callable[..., None]


def engine(name: str, started: float = 1.0, **changes: Any) -> Entry:
    load = Load(num_running=3, num_waiting=1, free_blocks=75, num_blocks=100)
    return Entry(name, "engine", Address(name, "", name), load=load, started=started, counters=Counters(**changes))


def manager(**changes: Any) -> Entry:
    load = Load(free_blocks=75, num_blocks=100, cached_blocks=30, quarantined_blocks=5)
    return Entry("kv", "kv_manager", Address("kv", "", "kv"), load=load, started=1.0, counters=Counters(**changes))


def frontend(num_ended: int, num_failed: int = 0) -> FrontendStats:
    times = Percentiles(4, 0.2, 0.1, 0.4, 0.5)
    stats = ModelStats("", 2, num_ended, num_failed, 0, 0, 0, times, times, times)
    return FrontendStats(60.0, (), stats)


def sample(time: float, *entries: Entry, stats: FrontendStats | None = None) -> Sample:
    door = Entry("door", "frontend", Address("control", "", "door"), started=1.0)
    return Sample(time, 100.0 + time, (door, *entries), {} if stats is None else {"door": stats})


def test_rates_are_what_happened_between_two_looks_by_the_time_between_them() -> None:
    finished = {"stop": 3, "abort": 1}
    before = sample(10.0, engine("a", num_generated_tokens=100, num_finished=finished), stats=frontend(10, 1))
    counts = {"num_generated_tokens": 150, "num_computed_tokens": 30, "num_finished": {"stop": 7, "abort": 2}}
    after = sample(12.0, engine("a", **counts), stats=frontend(16, 2))
    frame = frame_of("test", [before, after], rates_s=3.0)
    [row], [door] = frame.engines, frame.frontends
    assert (frame.interval_s, row.output_tps, row.prompt_tps, row.requests_per_s) == (2.0, 25.0, 15.0, 2.5)
    assert (row.num_running, row.num_waiting, row.kv_usage, row.uptime_s) == (3, 1, 0.25, 111.0)
    assert (door.requests_per_s, door.failed_per_s, door.num_in_flight) == (3.0, 0.5, 2)
    assert door.ttft_s is not None
    assert (door.ttft_s.p50, door.ttft_s.p95, door.ttft_s.p99) == (0.1, 0.4, 0.5)
    assert (frame.requests_per_s, frame.output_tps, frame.prompt_tps) == (3.0, 25.0, 15.0)


def test_an_engine_or_a_frontend_that_began_anew_counts_from_nothing() -> None:
    before = sample(10.0, engine("a", 1.0, num_generated_tokens=1000), stats=frontend(100))
    after = sample(11.0, engine("a", 10.5, num_generated_tokens=20), stats=frontend(4))
    frame = frame_of("test", [before, after], rates_s=3.0)
    assert frame.engines[0].output_tps == 20.0
    assert frame.frontends[0].requests_per_s == 4.0


def test_rates_are_of_the_last_seconds_and_hit_rates_of_all_samples() -> None:
    looks = [sample(0.0, manager()), sample(50.0, manager(num_queried_tokens=100, num_hit_tokens=90))]
    looks += [sample(53.0, manager(num_queried_tokens=160, num_hit_tokens=90, num_bytes_sent=3000))]
    [pool] = frame_of("test", looks, rates_s=3.0).pools
    assert (pool.queried_tps, pool.sent_bytes_per_s, pool.hit_rate) == (20.0, 1000.0, 90 / 160)
    assert (pool.used_blocks, pool.cached_blocks, pool.quarantined_blocks, pool.num_blocks) == (20, 30, 5, 100)
    assert frame_of("test", looks[:1], rates_s=3.0).pools[0].hit_rate is None


def test_a_frontend_that_does_not_answer_is_shown_without_numbers() -> None:
    [door] = frame_of("test", [sample(0.0), sample(1.0)], rates_s=3.0).frontends
    assert (door.name, door.requests_per_s, door.ttft_s) == ("door", None, None)


def test_engines_are_sorted_by_name_or_the_busiest_first() -> None:
    before = sample(0.0, engine("a"), engine("b"), engine("c"))
    more = {"a": 10, "b": 30, "c": 20}
    after = sample(1.0, *(engine(name, num_generated_tokens=num) for name, num in more.items()))
    rows = frame_of("test", [before, after], rates_s=3.0).engines
    assert [row.name for row in in_order(rows, "name")] == ["a", "b", "c"]
    assert [row.name for row in in_order(rows, "output")] == ["b", "c", "a"]
    assert all(len(in_order(rows, key)) == 3 for key in SORTS)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_narrow_terminal_gets_fewer_columns_and_none_that_is_cut_off(width: int) -> None:
    entries = engine("decode-of-much"), msgspec.structs.replace(manager(), detail={"lanes": "kv-cpu1: shm"})
    frame = frame_of("f", [sample(at, *entries, stats=frontend(4)) for at in (0.0, 1.0)], rates_s=3.0)
    out = io.StringIO()
    Console(file=out, width=width).print(view(frame, sort="name"))
    text = out.getvalue()
    assert "…" not in text
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert all(word in text for word in ("decode-of-much", "OUTPUT/S", "TTFT p50", "E2E p50", "CACHED"))
    assert ("EVICTED/S" in text) is (width == 200)


@pytest.mark.parametrize(
    ("used", "quarantined", "cached"), [(0, 0, 0), (1, 0, 99), (50, 1, 49), (100, 0, 0), (3, 3, 3)]
)
def test_a_bar_is_as_wide_as_any_and_what_is_there_shows(used: int, quarantined: int, cached: int) -> None:
    bar = pool_bar(PoolRow("kv", "", "", 100, used, cached, quarantined, None, 0, 0, 0, "")).plain
    assert len(bar) == BAR_WIDTH
    assert [mark in bar for mark in "█▓▒"] == [used > 0, quarantined > 0, cached > 0]
    assert bar.count("·") <= round(BAR_WIDTH * (100 - used - quarantined - cached) / 100) + 1


def test_a_sparkline_is_scaled_to_its_largest_value() -> None:
    assert sparkline([0.0, 4.0, 8.0]) == " ▄█"
    assert sparkline([0.0, 0.0]) == "  "
    assert sparkline([]) == ""


def frame_in(line: str) -> Frame:
    return msgspec.json.decode(line, type=Frame)


def test_a_pipe_gets_one_frame_with_rates_latencies_and_pools(fleet: ServedFleet) -> None:
    process = fleet.place.start("top", "--interval", "2")
    for _ in range(10):
        fleet.complete("x" * 100, max_tokens=20)
    out, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert lines["Fleet"][:6] == ["Fleet", "test", "2", "of", "2", "engines"]
    assert lines["decode"][:4] == ["decode", "decode", "tiny", "ready"]
    assert {"FRONTEND", "ENGINE", "POOL", "frontend", "prefill", "kv-cpu0", "kv-cpu1"} <= set(lines)
    assert all(len(line.rstrip()) <= 120 for line in out.splitlines())
    assert lines["frontend"][4] != "-"  # A median of times to the first token.


async def test_json_adds_up_to_what_was_asked_from_a_fleets_begin_to_its_end(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = await asyncio.to_thread(ServedFleet, place)
    begin = json.loads(place.callboard("top", "--json", "--once", "--interval", "0.3").stdout)
    assert begin["frontends"][0]["ttft_s"] == {"count": 0, "mean": None, "p50": None, "p95": None, "p99": None}

    process = place.start("top", "test", "--json", "--interval", "0.5")
    assert process.stdout is not None
    first = frame_in(process.stdout.readline())
    assert (first.fleet, first.output_tps) == ("test", 0.0)
    for _ in range(5):
        fleet.complete("x" * 100, max_tokens=30)
    generated, latest = 0.0, first
    while generated < 150 - 1e-6:  # Frames overlap by their rates' seconds, so this is reached soon or never.
        latest = frame_in(process.stdout.readline())
        generated = max(generated, latest.output_tps * latest.interval_s)
    assert generated == pytest.approx(150, abs=1)
    [door] = latest.frontends
    assert door.itl_s is not None
    assert door.itl_s.count == 5 * 29
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130

    # Who watches is told of the end: lines in a sentence, and the live view, which then closes.
    process = place.start("top", "--json", "--interval", "0.2")
    assert process.stdout is not None
    process.stdout.readline()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place.runtime))
    app = TopApp(open_fleet("test"), 0.2)
    async with app.run_test() as pilot:
        await shows(app, pilot, "2 of 2 engines ready")
        threading.Thread(target=place.callboard, args=("down",)).start()
        async with asyncio.timeout(PATIENCE_S):
            while app.error is None:
                await asyncio.sleep(0.05)
    assert str(app.error) == 'fleet "test" has ended'
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, 'callboard: fleet "test" has ended\n')


@pytest.fixture(scope="module")
def shaken(place_of_module: Any) -> ServedFleet:
    """A fleet whose control process is stopped, and killed."""
    return ServedFleet(place_of_module)


async def test_a_directory_that_does_not_answer_is_said_and_then_given_up(
    shaken: ServedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(shaken.place.runtime))
    monkeypatch.setattr(top_watch, "ASK_S", 0.3)
    monkeypatch.setattr(top_watch, "LOST_S", 1.0)
    control = shaken.rows()["main"]["pid"]
    frames: list[Frame] = []

    async def watch() -> None:
        async with asyncio.timeout(PATIENCE_S), top_watch.watching(open_fleet("test"), 0.2) as watcher:
            async for frame in watcher.frames():
                frames.append(frame)
                os.kill(control, signal.SIGSTOP)

    try:
        with pytest.raises(top_watch.FleetEnded, match='the directory of fleet "test" has not answered for') as ended:
            await watch()
    finally:
        os.kill(control, signal.SIGCONT)
    assert ended.value.exit_code == 1
    assert not frames[0].problem
    assert "these numbers are old" in frames[-1].problem
    assert len(frames[-1].engines) == 2


def test_a_control_process_that_is_restarted_is_waited_for(shaken: ServedFleet, eventually: Eventually) -> None:
    eventually(lambda: len(shaken.rows()) == 6)
    process = shaken.place.start("top", "--json", "--interval", "0.2")
    assert process.stdout is not None
    frame_in(process.stdout.readline())
    os.kill(shaken.rows()["main"]["pid"], signal.SIGKILL)
    eventually(lambda: len(rows := shaken.rows()) == 6 and rows.get("main", {}).get("num_restarts") == 1)

    restarted = time.time()

    def is_whole_again() -> bool:
        assert process.stdout is not None
        frame = frame_in(process.stdout.readline())
        is_idle = [each.num_in_flight for each in frame.frontends] == [0]
        return frame.time > restarted and len(frame.engines) == 2 and is_idle and not frame.problem

    eventually(is_whole_again)
    process.kill()
    process.communicate(timeout=PATIENCE_S)


def text_of(app: TopApp) -> str:
    return "\n".join("".join(segment.text for segment in line) for line in app.screen._compositor.render_strips())


async def shows(app: TopApp, pilot: Any, word: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while word not in text_of(app):
            await pilot.pause(0.05)


async def test_the_live_view_shows_sorts_pauses_and_quits(fleet: ServedFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(fleet.place.runtime))
    app = TopApp(open_fleet("test"), 0.2)
    async with app.run_test(size=(120, 30)) as pilot:
        await shows(app, pilot, "2 of 2 engines ready")
        await asyncio.to_thread(fleet.complete, "x" * 100)
        await shows(app, pilot, "kv-cpu1: shm")
        await pilot.press("space")
        await shows(app, pilot, "Paused")
        await pilot.press("space", "s")
        async with asyncio.timeout(PATIENCE_S):
            while "Paused" in text_of(app):
                await pilot.pause(0.05)
        assert all(word in text_of(app) for word in ("TTFT p50", "OUTPUT/S", "HITS", "Quit"))
        await pilot.press("q")
    assert app.error is None


async def test_ctrl_c_leaves_the_live_view(fleet: ServedFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(fleet.place.runtime))
    app = TopApp(open_fleet("test"), 0.2)
    async with app.run_test() as pilot:
        await pilot.press("ctrl+c")
        async with asyncio.timeout(PATIENCE_S):
            while app.is_running:
                await asyncio.sleep(0.02)
    assert app.error is None


def test_an_interval_that_is_none_is_refused(place: Any) -> None:
    for word in ("0", "nan", "soon", "1e9"):
        done = place.run("top", "--interval", word)
        assert done.returncode == 2
        assert f'"{word}" is no interval: give seconds' in done.stderr
