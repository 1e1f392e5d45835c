"""Nodes with tracers on a fleet's bus in this process, and what a follower says of them: for tests of following."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
from waiting import PATIENCE_S, until

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.directory import Directory
from callboard.actors.protocol import Entry, Register
from callboard.actors.trace_protocol import TRACER
from callboard.actors.tracer import Tracer
from callboard.bus import Address, Clock, Node, Ref
from callboard.bus.taps import SPAN
from callboard.tools.trace.attach import Follower
from callboard.tools.trace.event import Event
from callboard.tools.trace.notice import Notice

FACTS, BODY = msgspec.Raw(b"\x80"), msgspec.Raw(b"\xc0")


def make_record(node: Node, request_id: str, number: int, name: str = "work") -> None:
    """Let a node note a span, ``number`` being its id."""
    now = node.clock.now()
    node.record((SPAN, now, now - 0.001, "worker", "", "", name, request_id, number, 0, 0, 0, 0.0, "", FACTS, BODY))


class Place:
    """Nodes that a test starts and stops; ``hub`` has the directory."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.nodes: dict[str, Node] = {}
        self.tracers: dict[str, Tracer] = {}
        self.directory: Address

    async def start(self, name: str, *, clock: Clock | None = None) -> Node:
        """Start a node with a tracer, and enter an actor of it in the directory."""
        node = Node(name, endpoint=f"ipc://{self.folder}/{name}.sock", fleet="test", clock=clock)
        self.nodes[name] = await self.stack.enter_async_context(node)
        self.tracers[name] = Tracer()
        await start_actor(node, TRACER, self.tracers[name])
        if name != "hub":
            entry = Entry(f"actor-{name}", "actor", node.address_of("worker"))
            await node.ref(self.directory).ask(Register(entry, 3600.0))
        return node

    async def stop(self, name: str) -> None:
        """Stop a node in order."""
        await stop_actor(self.tracers.pop(name))
        await self.nodes.pop(name).stop()

    def followers(self) -> int:
        return sum(tracer.num_followers for tracer in self.tracers.values())


@asynccontextmanager
async def place(folder: Path) -> AsyncIterator[Place]:
    """Give a place with the nodes ``hub`` and ``one``."""
    async with AsyncExitStack() as stack:
        made = Place(folder, stack)
        hub = await made.start("hub")
        directory = Directory()
        ref: Ref = await start_actor(hub, "directory", directory)
        made.directory = ref.address
        await made.start("one")
        yield made
        await stop_actor(directory)
        for tracer in made.tracers.values():
            await stop_actor(tracer)


class Watcher:
    """What a follower has said so far."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower
        self.events: list[Event] = []
        self.notices: list[Notice] = []

    async def read(self) -> None:
        async for batch in self.follower:
            for item in batch:
                if isinstance(item, Notice):
                    self.notices.append(item)
                else:
                    self.events.append(item)

    def kinds(self, node: str = "") -> list[str]:
        return [notice.kind for notice in self.notices if not node or notice.node == node]

    def spans(self, node: str = "one") -> list[int]:
        return [event.record.span for event in self.events if event.node == node and event.record.name == "work"]

    async def until(self, condition: Callable[["Watcher"], bool], seconds: float = PATIENCE_S) -> None:
        await until(lambda: condition(self), seconds)

    def seen(self) -> str:
        """Say what was told so far."""
        return f"{len(self.events)} events, and {[notice.text for notice in self.notices]}"


@asynccontextmanager
async def watching(made: Place, **options: bool) -> AsyncIterator[Watcher]:
    """Follow all nodes from a node of one's own, and read on; the past has been told."""
    async with Node("watcher", fleet="test") as mine:
        async with Follower(mine, made.directory, **options) as follower:
            watcher = Watcher(follower)
            reading = asyncio.ensure_future(watcher.read())
            await watcher.until(lambda each: "following" in each.kinds())
            yield watcher
            reading.cancel()
            await asyncio.wait([reading])
