"""A process on the bus, the node ``peer`` with the actor ``peer``, that does to others what a test tells it to do."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import uvloop
from waiting import PATIENCE_S

from callboard.bus import FOREVER, Address, Ask, LinkConfig, Message, Node, Ref, Stream, Tell

PAYLOAD = "x" * 250


class Start(msgspec.Struct):
    """What such a process is told at its start."""

    endpoint: str
    links: LinkConfig = LinkConfig()
    reads: Address | None = None
    """Whose Offer it opens by itself, to take ten items."""


@asynccontextmanager
async def running(start: Start) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run such a process; it is ready."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, msgspec.json.encode(start).decode(), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class Event(Message, frozen=True):
    number: int
    payload: str


class Done(Message, frozen=True):
    pass


class Counts(Message, frozen=True):
    num_offered: int
    """Events that the producers of all streams here have made."""
    num_taken: int
    """Events that the readers here have taken."""
    num_told: int


class Offer(Stream[Event], frozen=True):
    """Events without end, as fast as they go."""


class Read(Ask[Done], frozen=True):
    """Open ``source``'s Offer and take ``num_items`` of it, then no more, and hold the stream open."""

    source: Ref
    num_items: int


class GoOn(Ask[Done], frozen=True):
    """Take ``num_items`` more of the stream held open; answered when that is done."""

    num_items: int


class Flood(Ask[Done], frozen=True):
    """Tell ``target`` so often, without a break."""

    target: Ref
    num_tells: int
    num_bytes: int = 250


class Note(Tell, frozen=True):
    payload: str


class GetCounts(Ask[Counts], frozen=True):
    pass


class Hang(Ask[Done], frozen=True):
    """Keep the event loop busy for so long."""

    seconds: float


class Wait(Ask[Done], frozen=True):
    """Be answered never."""


class Peer:
    """The actor ``peer`` of such a process."""

    def __init__(self) -> None:
        self.num_offered = 0
        self.num_taken = 0
        self.num_told = 0
        self._going_on: asyncio.Queue[int] = asyncio.Queue()
        self._is_idle = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def on_offer(self, message: Offer) -> AsyncIterator[Event]:
        number = 0
        while True:
            self.num_offered += 1
            yield Event(number, PAYLOAD)
            number += 1
            if number % 100 == 0:
                await asyncio.sleep(0)  # Others have their turn: a producer is a good citizen, if an endless one.

    async def on_read(self, message: Read) -> Done:
        self._tasks.append(asyncio.ensure_future(self._read(message.source)))
        return await self.on_go_on(GoOn(message.num_items))

    async def on_go_on(self, message: GoOn) -> Done:
        self._is_idle.clear()
        self._going_on.put_nowait(message.num_items)
        await self._is_idle.wait()
        return Done()

    async def _read(self, source: Ref) -> None:
        async with source.stream(Offer(), timeout=FOREVER) as events:
            expected = 0
            while True:
                for _ in range(await self._going_on.get()):
                    event = await anext(events)
                    assert event.number == expected
                    expected += 1
                    self.num_taken += 1
                self._is_idle.set()

    async def on_flood(self, message: Flood) -> Done:
        for number in range(message.num_tells):
            message.target.tell(Note("x" * message.num_bytes))
            if number % 1000 == 0:
                await asyncio.sleep(0)
        return Done()

    def on_note(self, message: Note) -> None:
        self.num_told += 1

    def on_get_counts(self, message: GetCounts) -> Counts:
        return Counts(self.num_offered, self.num_taken, self.num_told)

    def on_hang(self, message: Hang) -> Done:
        until = time.monotonic() + message.seconds
        while time.monotonic() < until:
            pass
        return Done()

    async def on_wait(self, message: Wait) -> Done:
        await asyncio.Event().wait()
        return Done()


async def main() -> None:
    start = msgspec.json.decode(sys.argv[1], type=Start)
    async with Node("peer", endpoint=start.endpoint, links=start.links) as node:
        peer = Peer()
        node.add("peer", peer)
        if start.reads is not None:
            await peer.on_read(Read(node.ref(start.reads), 10))
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
