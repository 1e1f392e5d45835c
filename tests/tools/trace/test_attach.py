"""Following a fleet: all is told once and in order, what is lost is counted, and nothing stays behind."""

import asyncio
from pathlib import Path

import pytest
from following import make_record, place, watching
from waiting import PATIENCE_S

from callboard.actors.protocol import Entry, Register, Unregister
from callboard.actors.trace_protocol import TRACER
from callboard.bus import Node
from callboard.tools.trace import attach
from callboard.tools.trace.attach import Follower
from callboard.tools.trace.notice import Notice


def cut_links(node: Node) -> None:
    """Break all links of a node, as a network does."""
    for link in list(node._links._links):
        node._links._overflow(link)


async def test_the_past_comes_first_and_then_what_happens_in_the_order_of_its_times(tmp_path: Path) -> None:
    async with place(tmp_path) as made:
        one, two = made.nodes["one"], await made.start("two")
        for number in range(500):
            make_record(one, f"r{number % 7}", number)
        async with watching(made) as watcher:
            assert sorted(watcher.spans()) == list(range(500))
            assert watcher.notices[-1].text == "now following test: 3 nodes"
            for number in range(500, 900):
                make_record((one, two)[number % 2], "r", number)
                await asyncio.sleep(0)
            await watcher.until(lambda each: len(each.events) == 900)
            assert [event.record.span for event in watcher.events[500:]] == list(range(500, 900))
            assert all(event.error_s == 0.0 and event.time == event.record.time for event in watcher.events)


async def test_without_the_past_only_what_happens_is_told(tmp_path: Path) -> None:
    async with place(tmp_path) as made:
        make_record(made.nodes["one"], "r", 1)
        async with watching(made, with_past=False) as watcher:
            make_record(made.nodes["one"], "r", 2)
            await watcher.until(lambda each: bool(each.events))
            assert watcher.spans() == [2]


async def test_messages_of_no_request_are_told_to_those_who_want_everything(tmp_path: Path) -> None:
    async with place(tmp_path) as made:
        one = made.nodes["one"]
        async with watching(made) as some, watching(made, everything=True) as all_of_it:
            make_record(one, "", 1)
            make_record(one, "r", 2)
            await all_of_it.until(lambda each: len(each.spans()) == 2)
            await some.until(lambda each: len(each.spans()) == 1)
            assert some.spans() == [2]


async def test_detaching_leaves_nothing_behind(tmp_path: Path) -> None:
    async with place(tmp_path) as made:
        links = {name: len(node._links._links) for name, node in made.nodes.items()}
        tasks = len(asyncio.all_tasks())
        for _ in range(3):
            async with watching(made, everything=True) as watcher:
                make_record(made.nodes["one"], "r", 1)
                await watcher.until(lambda each: bool(each.spans()))
                assert made.followers() == 2
        async with asyncio.timeout(PATIENCE_S):
            while made.followers() or len(asyncio.all_tasks()) > tasks:
                await asyncio.sleep(0.01)
        for name, node in made.nodes.items():
            assert node.trace.followers == ()
            assert node.tap is None
            assert len(node._links._links) == links[name]


async def test_a_node_that_comes_is_followed_and_one_that_stops_is_told_of(tmp_path: Path) -> None:
    async with place(tmp_path) as made, watching(made) as watcher:
        two = await made.start("two")
        await watcher.until(lambda each: "came" in each.kinds("two"))
        make_record(two, "r", 5)
        await watcher.until(lambda each: each.spans("two") == [5])
        await made.stop("two")
        await watcher.until(lambda each: "stopped" in each.kinds("two"))
        await made.start("two")
        await watcher.until(lambda each: each.kinds("two") == ["came", "stopped", "back"])
        assert "as a new process" in watcher.notices[-1].text


async def test_a_link_that_breaks_loses_nothing_that_the_ring_remembers(tmp_path: Path) -> None:
    async with place(tmp_path) as made, watching(made) as watcher:
        one = made.nodes["one"]
        for round_ in range(3):
            for number in range(800):
                make_record(one, f"r{number % 5}", 800 * round_ + number)
                if number == 400:
                    cut_links(one)
            await watcher.until(lambda each, num=round_: each.kinds("one").count("back") > num)  # type: ignore[misc]
        await watcher.until(lambda each: len(each.spans()) >= 2400)
        assert sorted(watcher.spans()) == list(range(2400))
        assert watcher.follower.num_lost == 0
        assert any("records of that time caught up" in notice.text for notice in watcher.notices)


@pytest.mark.parametrize("num_early", [0, 10])
async def test_what_a_ring_had_to_forget_while_the_link_was_down_is_counted(tmp_path: Path, num_early: int) -> None:
    async with place(tmp_path) as made, watching(made) as watcher:
        one = made.nodes["one"]
        one.trace.keep = 3
        for number in range(num_early):
            make_record(one, "early", number)
        await watcher.until(lambda each: len(each.spans()) == num_early)
        await watcher.until(lambda each: not each.follower.followed["one"].is_in_past)
        cut_links(one)
        for number in range(50):
            make_record(one, f"r{number}", 100 + number)
        await watcher.until(lambda each: "back" in each.kinds("one"))
        [back] = [notice for notice in watcher.notices if notice.kind == "back"]
        assert sorted(watcher.spans()) == [*range(num_early), 147, 148, 149]
        assert back.num_lost == watcher.follower.num_lost == 47
        assert back.text.endswith("3 records of that time caught up, 47 lost")


async def test_a_node_that_dropped_out_of_the_directory_is_known_again(tmp_path: Path) -> None:
    async with place(tmp_path) as made, watching(made) as watcher:
        one = made.nodes["one"]
        make_record(one, "r", 1)
        await watcher.until(lambda each: each.spans() == [1])
        hub = one.ref(made.directory)
        await hub.ask(Unregister("actor-one"))
        await watcher.until(lambda each: "one" not in each.follower._listed)
        cut_links(one)
        make_record(one, "r", 2)
        await watcher.until(lambda each: "cut" in each.kinds("one"))
        await asyncio.sleep(0.2)
        await hub.ask(Register(Entry("actor-one", "actor", one.address_of("worker")), 60.0))
        await watcher.until(lambda each: "back" in each.kinds("one"))
        assert watcher.spans() == [1, 2]


async def test_a_tracer_that_is_late_is_waited_for(tmp_path: Path) -> None:
    async with place(tmp_path) as made, watching(made) as watcher:
        two = await made.start("two")
        two.remove(TRACER)
        await watcher.until(lambda each: "two" in each.follower.followed)
        await asyncio.sleep(0.3)
        two.add(TRACER, made.tracers["two"])
        make_record(two, "r", 1)
        await watcher.until(lambda each: each.spans("two") == [1])
        assert "without" not in watcher.kinds()


async def test_a_reader_that_stops_reading_loses_records_counted_and_memory_stays_bounded(tmp_path: Path) -> None:
    num = 150_000
    async with place(tmp_path) as made, Node("watcher", fleet="test") as mine:
        one = made.nodes["one"]
        async with Follower(mine, made.directory) as follower:
            async with asyncio.timeout(PATIENCE_S):
                async for batch in follower:
                    if any(isinstance(item, Notice) and item.kind == "following" for item in batch):
                        break
            for number in range(num):
                make_record(one, f"r{number % 1000}", number)
                if number % 500 == 0:
                    await asyncio.sleep(0)
            await asyncio.sleep(0.5)
            assert len(follower._waiting) <= attach.MOST_WAITING + 1000
            told: list[int] = []
            lost = 0
            async with asyncio.timeout(PATIENCE_S):
                async for batch in follower:
                    told += [item.record.span for item in batch if not isinstance(item, Notice)]
                    lost += sum(item.num_lost for item in batch if isinstance(item, Notice))
                    if len(told) + lost >= num:
                        break
            assert lost > 0
            assert len(told) + lost == num
            assert told == sorted(set(told))
            assert follower.num_lost == lost


async def test_a_tracer_that_is_missing_is_named_and_the_others_are_followed(tmp_path: Path) -> None:
    async with place(tmp_path) as made:
        made.nodes["one"].remove(TRACER)
        async with watching(made) as watcher:
            assert "now following test: 1 node" in [notice.text for notice in watcher.notices]
            await watcher.until(lambda each: "without" in each.kinds())
            [notice] = [each for each in watcher.notices if each.node == "one"]
            assert notice.text.startswith("one tells nothing: there is no actor 'tracer.node'")


async def test_a_fleet_of_which_nobody_is_reached_any_more_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "PATIENCE_S", 0.5)
    async with place(tmp_path) as made, watching(made) as watcher:
        for name in list(made.nodes):
            await made.stop(name)
        await watcher.until(lambda each: "ended" in each.kinds())
        assert watcher.notices[-1].text == "fleet test has ended"
