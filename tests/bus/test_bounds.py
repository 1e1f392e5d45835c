"""Peers that do not read, or keep to no credit: nobody's memory grows, and nobody else waits. Real processes."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq
from bus_peer import Counts, Event, Flood, GetCounts, GoOn, Offer, Read, Start, running
from raw_peer import RawListener

from callboard.bus import Address, LinkConfig, Node, NotUnderstood, Ref, VirtualClock
from callboard.bus.calls import DEFAULT_CREDIT
from callboard.bus.complaints import Complaints
from callboard.bus.frames import (
    PROTOCOL_VERSION,
    Answer,
    Cancel,
    Hello,
    Items,
    Post,
    encode_batch,
)
from callboard.bus.testing import run_virtual

MIB = 1 << 20
MOST_GROWTH = 32 * MIB
NUM_EVENTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Process:
    """A process of bus_peer.py and its actor, as the test's own node sees it."""

    process: asyncio.subprocess.Process
    ref: Ref

    def rss(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    async def counts(self) -> Counts:
        return await self.ref.ask(GetCounts(), timeout=10)


@asynccontextmanager
async def peers(folder: Path, *names: str) -> AsyncIterator[list[Process]]:
    """Start processes, each the node ``peer`` at an endpoint of its own."""
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(Node("test"))
        found = []
        for name in names:
            endpoint = f"ipc://{folder}/{name}.sock"
            process = await stack.enter_async_context(running(Start(endpoint)))
            found.append(Process(process, node.ref(Address("peer", endpoint, "peer"))))
        yield found


async def settled(process: Process) -> Counts:
    """Return the counts once no more is offered."""
    before = await process.counts()
    while True:
        await asyncio.sleep(0.1)
        after = await process.counts()
        if after.num_offered == before.num_offered:
            return after
        before = after


async def test_a_million_events_through_a_reader_that_stops_and_goes_leave_memory_flat(tmp_path: Path) -> None:
    async with peers(tmp_path, "sender", "receiver") as (sender, receiver):
        await receiver.ref.ask(Read(sender.ref, 20_000), timeout=30)
        before = sender.rss(), receiver.rss()
        for _ in range(5):
            await receiver.ref.ask(GoOn(NUM_EVENTS // 5), timeout=60)
            counts = await settled(sender)
            taken = (await receiver.counts()).num_taken
            # Held back: what is offered beyond what was taken is the credit, and the one that waits for it.
            assert counts.num_offered - taken <= DEFAULT_CREDIT + 1
        assert taken == NUM_EVENTS + 20_000
        assert sender.rss() - before[0] < MOST_GROWTH
        assert receiver.rss() - before[1] < MOST_GROWTH


@pytest.mark.parametrize("is_stopped", [False, True])
async def test_a_receiver_that_does_not_read_holds_back_its_sender_and_nobody_else(
    tmp_path: Path, is_stopped: bool
) -> None:
    async with peers(tmp_path, "sender", "deaf", "reader") as (sender, deaf, reader):
        await deaf.ref.ask(Read(sender.ref, 1000), timeout=30)
        if is_stopped:
            deaf.process.send_signal(signal.SIGSTOP)
        offered = (await settled(sender)).num_offered
        before = sender.rss(), deaf.rss()
        # Another reads hundreds of thousands meanwhile, and the sender answers.
        await reader.ref.ask(Read(sender.ref, 300_000), timeout=60)
        counts = await settled(sender)
        assert 300_000 <= counts.num_offered - offered <= 300_000 + DEFAULT_CREDIT + 1
        if is_stopped:
            deaf.process.send_signal(signal.SIGCONT)
        else:
            # The deaf one's other peers are served, too: it reads from somebody else, and is told.
            await reader.ref.ask(Flood(deaf.ref, 1000), timeout=30)
        assert (await deaf.counts()).num_taken == 1000
        assert sender.rss() - before[0] < MOST_GROWTH
        assert deaf.rss() - before[1] < MOST_GROWTH
        await deaf.ref.ask(GoOn(10_000), timeout=30)  # It checks that none is missing.


async def test_a_receiver_of_tells_that_stops_is_cut_off_before_they_fill_the_senders_memory(tmp_path: Path) -> None:
    backlog = LinkConfig().max_backlog_bytes
    async with peers(tmp_path, "sender", "deaf", "reader") as (sender, deaf, reader):
        await sender.ref.ask(Flood(deaf.ref, 1000), timeout=30)
        before = sender.rss()
        deaf.process.send_signal(signal.SIGSTOP)
        for _ in range(5):  # Twice what may wait: a tell waits for nobody.
            await sender.ref.ask(Flood(deaf.ref, 2 * backlog // 5 // 10_000, 10_000), timeout=60)
            assert sender.rss() - before < backlog + 2 * MOST_GROWTH
        await sender.ref.ask(Flood(reader.ref, 1000), timeout=30)
        async with asyncio.timeout(10):
            while (await reader.counts()).num_told < 1000:
                await asyncio.sleep(0.01)
        deaf.process.send_signal(signal.SIGCONT)
        # What was lost is lost; the next ones go over a new link.
        async with asyncio.timeout(20):
            while (told := (await deaf.counts()).num_told) < 1000 or not (await sender.ref.ask(Flood(deaf.ref, 1))):
                await asyncio.sleep(0.01)
            while (await deaf.counts()).num_told == told:
                await asyncio.sleep(0.01)


async def test_items_beyond_the_credit_end_their_stream_and_are_not_kept(tmp_path: Path) -> None:
    raw = RawListener(f"ipc://{tmp_path}/raw.sock")
    item = msgspec.Raw(msgspec.msgpack.encode([Event(0, "x" * 10_000)]))
    async with Node("a") as node:
        ref = node.ref(Address("raw", raw.endpoint, "peer"))
        async with ref.stream(Offer(), timeout=20, credit=4) as events:
            await raw.welcome()
            post = await raw.next(Post)
            before = psutil.Process().memory_info().rss
            for _ in range(10_000):  # 100 MB.
                await raw.send(Items(post.id, item))
            assert (await raw.next(Cancel)).id == post.id
            for _ in range(4):
                await anext(events)
            with pytest.raises(NotUnderstood, match="credit"):
                await anext(events)
            assert psutil.Process().memory_info().rss - before < MOST_GROWTH
        # The link is whole: one stream's fault is not another's.
        asked = asyncio.ensure_future(ref.ask(GetCounts(), timeout=10))
        post = await raw.next(Post)
        await raw.send(Answer(post.id, msgspec.Raw(msgspec.msgpack.encode(Counts(1, 2, 3)))))
        assert await asked == Counts(1, 2, 3)
    raw.close()


def test_complaints_about_a_peer_are_few_and_say_how_many_they_stand_for(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        complaints = Complaints(logging.getLogger("callboard.bus"), "a", VirtualClock())
        for _ in range(200):
            complaints.about("b", "talks nonsense")
            complaints.about("c", "does too")
            await asyncio.sleep(0.125)
        for number in range(10_000):
            complaints.about(f"stranger-{number}", "has a name of its own every time")

    run_virtual(story)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:6] == [
        "a: peer b talks nonsense",
        "a: peer c does too",
        "a: peer b talks nonsense (and 79 complaints more since the last line)",
        "a: peer c does too (and 79 complaints more since the last line)",
        "a: peer b talks nonsense (and 79 complaints more since the last line)",
        "a: peer c does too (and 79 complaints more since the last line)",
    ]
    assert len(lines) < 100


async def test_what_a_stranger_sends_fills_neither_the_log_nor_the_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Node("a", endpoint=f"ipc://{tmp_path}/a.sock") as node:
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.linger = 0
            stranger.connect(node.endpoint)
            for _ in range(500):
                stranger.send(b"nonsense")
            forged = "x\nERROR forged line " + "y" * 100_000
            hello = Hello(PROTOCOL_VERSION, forged, forged, forged, "")
            for _ in range(500):
                stranger.send(encode_batch((forged, 0, [hello])))
            async with asyncio.timeout(20):
                while node._links.num_refused < 1000:
                    await asyncio.sleep(0.01)
    lines = [record.getMessage() for record in caplog.records]
    assert 1 <= len(lines) <= 2
    assert all(len(line) < 1000 and "\n" not in line for line in lines)
