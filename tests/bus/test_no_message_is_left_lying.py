"""No message waits in a socket until the next one comes: with tiny queues, peers fast and slow, all ways at once.

ZeroMQ's descriptors tell of input once. Pings would bring to light what was missed: here there are none.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop

from callboard.bus import Address, Ask, LinkConfig, Message, Node, Ref, Stream, Tell
from callboard.bus.keys import FleetKeys
from callboard.bus.transports import zmq as transport

QUIET = LinkConfig(ping_s=1000.0, silent_s=10_000.0)
NUM_PEERS = 6
NUM_TELLS = 1500
NUM_ITEMS = 1500


class Note(Tell, frozen=True):
    sender: str
    number: int
    payload: str


class Seen(Message, frozen=True):
    num_notes: int


class GetSeen(Ask[Seen], frozen=True):
    pass


class Numbers(Stream[int], frozen=True):
    count: int


class Work(Ask[int], frozen=True):
    """Speak to ``target`` in every way, then say how many answers came."""

    target: Ref
    seed: int


class Peer:
    def __init__(self, name: str, pause_s: float) -> None:
        self.name = name
        self.pause_s = pause_s
        self.seen: dict[str, int] = {}

    def on_note(self, message: Note) -> None:
        assert message.number == self.seen.get(message.sender, 0), "a note is missing or out of order"
        self.seen[message.sender] = message.number + 1
        if self.pause_s and message.number % 50 == 0:
            time.sleep(self.pause_s)  # A slow peer hangs now and then; what comes meanwhile piles up.

    def on_get_seen(self, message: GetSeen) -> Seen:
        return Seen(sum(self.seen.values()))

    async def on_numbers(self, message: Numbers) -> AsyncIterator[int]:
        for number in range(message.count):
            if number % 7 == 0:
                await asyncio.sleep(0)
            yield number

    async def on_work(self, message: Work) -> int:
        async def tell() -> None:
            for number in range(NUM_TELLS):
                message.target.tell(Note(self.name, number, "x" * (number * 37 % 3000)))
                if number % (1 + message.seed) == 0:
                    await asyncio.sleep(0)

        async def ask() -> int:
            for _ in range(300):
                await message.target.ask(GetSeen(), timeout=50)
            return 300

        async def read(credit: int) -> int:
            count = 0
            async with message.target.stream(Numbers(NUM_ITEMS), timeout=50, credit=credit) as items:
                async for item in items:
                    assert item == count
                    count += 1
            return count

        async with asyncio.TaskGroup() as group:
            group.create_task(tell())
            counted = [group.create_task(ask()), group.create_task(read(1)), group.create_task(read(64))]
        return sum(task.result() for task in counted)


class Elsewhere:
    """A node in a thread of its own."""

    def __init__(self, make: Callable[[], Node], peer: Peer) -> None:
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=lambda: uvloop.run(self._run(make, peer)))
        self._thread.start()
        assert self._ready.wait(10)

    async def _run(self, make: Callable[[], Node], peer: Peer) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with make() as node:
            node.add("peer", peer)
            self._ready.set()
            await self._stop.wait()

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)


# With keys one place of a queue is never free again: what ZAP said of the peer goes through it, uncounted at its end.
@pytest.mark.parametrize(("most_queued", "has_keys"), [(1, False), (5, False), (2, True), (5, True)])
async def test_all_arrives_without_anybody_asking_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_queued: int, has_keys: bool
) -> None:
    monkeypatch.setattr(transport, "HIGH_WATER_MARK", most_queued)
    monkeypatch.setattr(transport, "DRAIN_PER_PASS", 3)
    keys = FleetKeys(bytes(32), "") if has_keys else None

    def endpoint(name: str) -> str:
        return f"ipc://{tmp_path}/{name}.sock"

    def maker(name: str) -> Callable[[], Node]:
        return lambda: Node(name, endpoint=endpoint(name), links=QUIET, keys=keys)

    hub = Peer("hub", 0.0)
    others = [Elsewhere(maker(f"p{number}"), Peer(f"p{number}", 0.002 * (number % 3))) for number in range(NUM_PEERS)]
    try:
        async with asyncio.timeout(60), maker("hub")() as node:
            ref = node.add("peer", hub)
            refs = [node.ref(Address(f"p{number}", endpoint(f"p{number}"), "peer")) for number in range(NUM_PEERS)]
            async with asyncio.TaskGroup() as group:
                # All speak to the hub, over links that they dial, and the hub to the first of them at the same time.
                works = [group.create_task(one.ask(Work(ref, seed), timeout=55)) for seed, one in enumerate(refs)]
                works += [group.create_task(ref.ask(Work(one, seed), timeout=55)) for seed, one in enumerate(refs[:1])]
            assert [work.result() for work in works] == [300 + 2 * NUM_ITEMS] * len(works)
            while sum(hub.seen.values()) < NUM_PEERS * NUM_TELLS:
                await asyncio.sleep(0.01)
            while (await refs[0].ask(GetSeen(), timeout=10)).num_notes < NUM_TELLS:
                await asyncio.sleep(0.01)
    finally:
        for other in others:
            other.end()
