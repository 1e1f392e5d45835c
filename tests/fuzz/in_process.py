"""The fuzz of a whole fleet in one process: production actors over the in-process transport, on a virtual clock.

Everything follows from the seed, so a failure replays. After each burst the clock moves a little, and by then the nodes
have done all there was to do.
"""

import asyncio
import gc
import logging
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fleet import Fleet, running_fleet

from callboard.actors.engine.simulated import simulated_tokens
from callboard.actors.kv_manager import KvManager
from callboard.actors.protocol import Abort, GetKvStats, GetSubRequests, ListEntries, SamplingParams
from callboard.bus import Ask, Message, Node, Ref, Stream, Tell
from callboard.bus.clock import VirtualClock
from callboard.bus.testing import VirtualLoop
from callboard.bus.transports.inproc import InprocHub

from .mutator import FUZZ_ADDRESS, Mutator
from .peer import Peer
from .recorder import LAYOUT, NUM_BLOCKS, SEED, Corpus

T = TypeVar("T")

BURST = 64
BURST_S = 0.002
HONEST_EVERY = 64
"""Bursts."""
SETTLE_S = 700.0
"""After this long on the virtual clock nothing is under way any more: every deadline and lease is shorter."""
LONGEST_LINE = 4096
MOST_PASSES = 20_000
"""Of the loop, for one burst or one round of honest questions."""
EXPECTED_ERRORS = ("script %s failed: %s",)
"""Logged as errors, but of a router script whose engine lied to it; no actor suffers."""


class FuzzError(Exception):
    """Something happened that must not. The text says what; ``lines`` are what was sent where around that time."""

    def __init__(self, text: str, sent: int = 0, lines: list[tuple[str, list[bytes]]] | None = None) -> None:
        super().__init__(text)
        self.sent = sent
        self.lines = lines or []


@dataclass(frozen=True)
class Totals:
    """What a run came to."""

    counts: Counter[str]
    num_refused: int
    """By the nodes' own count."""
    growth_mib: float
    """Of resident memory, from a fifth of the run to its end."""
    num_lines: int
    """Logged."""


class FuzzLoop(VirtualLoop):
    """A virtual loop as strict as uvloop, which takes no timer that is not a number. It ends a fleet that spins."""

    num_passes = 0
    """Since somebody set it to 0."""

    def _run_once(self) -> None:
        self.num_passes += 1
        if self.num_passes > MOST_PASSES:
            raise FuzzError(f"the fleet spins, in: {[repr(handle)[:300] for handle in list(self._ready)[:5]]}")
        super()._run_once()

    def call_at(self, when: float, *args: Any, **options: Any) -> Any:
        if when != when:
            raise ValueError("a timer at no time")
        return super().call_at(when, *args, **options)

    async def sock_connect(self, sock: Any, address: Any) -> None:
        raise ConnectionRefusedError(f"nobody is at {address}")


class Word(Message, frozen=True):
    text: str


class Say(Ask[Word], frozen=True):
    text: str
    many: tuple[int, ...] = ()
    maybe: float | None = None


class Ponder(Ask[Word], frozen=True):
    text: str
    seconds: float = 0.0


class Recite(Stream[Word], frozen=True):
    text: str
    count: int


class Hint(Tell, frozen=True):
    text: str
    facts: dict[str, int] = {}


class Muse(Tell, frozen=True):
    text: str


class Parrot:
    """A handler of every kind."""

    def on_say(self, message: Say) -> Word:
        return Word(message.text)

    async def on_ponder(self, message: Ponder) -> Word:
        await asyncio.sleep(min(1.0, max(0.0, message.seconds)))
        return Word(message.text)

    async def on_recite(self, message: Recite) -> AsyncIterator[Word]:
        for _ in range(message.count):
            yield Word(message.text)

    def on_hint(self, message: Hint) -> None:
        pass

    async def on_muse(self, message: Muse) -> None:
        await asyncio.sleep(0)


class Alarm(logging.Handler):
    """Counts what is logged, and keeps what must not be: errors, and lines without end."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.num_lines = 0
        self.problems: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.num_lines += 1
        text = record.getMessage()
        if record.levelno >= logging.ERROR and record.msg not in EXPECTED_ERRORS:
            self.problems.append(self.format(record))
        elif len(text) > LONGEST_LINE:
            self.problems.append(f"a line of {len(text)} characters was logged: {text[:200]}")


class World:
    """A fleet under fuzz."""

    def __init__(self, fleet: Fleet, peer: Peer, alarm: Alarm) -> None:
        self.fleet = fleet
        self.peer = peer
        self.alarm = alarm
        loop = asyncio.get_running_loop()
        assert isinstance(loop, FuzzLoop)
        self.loop = loop
        self.loop_problems: list[str] = []
        self._calm: dict[str, tuple[int, ...]] = {}

    def note_calm(self) -> None:
        """Remember what stands in a fleet that nobody bothers."""
        self._calm = self._census()

    def _census(self) -> dict[str, tuple[int, ...]]:
        return {name: census(node, self.fleet.nodes) for name, node in self.fleet.nodes.items()}

    def check(self) -> None:
        """Raise FuzzError if something went wrong."""
        problems = [*self.loop_problems, *self.alarm.problems, *self.peer.problems]
        if problems:
            raise FuzzError("\n".join(problems[:3]))

    async def burst(self, count: int) -> None:
        """Send some batches, and let the fleet deal with all of them."""
        self.loop.num_passes = 0
        self.peer.used.clear()
        for _ in range(count):
            self.peer.send_one()
        await asyncio.sleep(BURST_S)
        self.peer.judge()
        self.check()

    async def ask_honestly(self) -> None:
        """See that every actor still answers an honest node, and that no pool has lost count."""
        self.loop.num_passes = 0
        fleet, client = self.fleet, self.fleet.client
        for name, node in fleet.nodes.items():
            if name != "client":
                word = await Ref(client, node.address_of("parrot")).ask(Say("alive"), timeout=5)
                if word != Word("alive"):
                    raise FuzzError(f"node {name} answered {word}")
        await fleet.router.ask(GetSubRequests(limit=1), timeout=5)
        for name, actor in fleet.actors.items():
            if name == "directory":
                await Ref(client, actor.ref.address).ask(ListEntries(), timeout=5)
            elif name in ("p", "d"):
                await Ref(client, actor.ref.address).ask(Abort("nobody's"), timeout=5)
        for name, manager in fleet.managers.items():
            stats = await manager.ask(GetKvStats(), timeout=5)
            if stats.problems:
                raise FuzzError(f"the pool of {name}: {stats.problems}")

    async def settle(self) -> None:
        """Let all deadlines pass; everything must have had its end, and nothing be left of it. Then serve a request."""
        self.loop.num_passes = -1_000_000
        await asyncio.sleep(150)
        if debts := self.peer.debts():
            raise FuzzError(f"{len(debts)} questions had no end: {debts[:5]}")
        await self.peer.stop()
        await asyncio.sleep(SETTLE_S)
        self.check()
        left = self._census()
        if left != self._calm:
            changed = {name: (self._calm[name], left[name]) for name in left if left[name] != self._calm[name]}
            raise FuzzError(f"strangers, asked, served, handlers, before and after: {changed}")
        prompt = list(range(900, 970))  # One that no lie about what is in place can have been about.
        tokens = (await self.fleet.generate(prompt, SamplingParams(max_tokens=8, ignore_eos=True))).tokens
        if tokens != simulated_tokens(prompt, 8):
            raise FuzzError(f"the fleet generates {tokens}")
        await asyncio.sleep(5)
        for name in self.fleet.managers:
            stats = await self.fleet.stats(name)
            # A writer that was never proven dead keeps its blocks in quarantine: nobody knows that it writes no more.
            if stats.problems or stats.free + stats.cached + stats.quarantined != stats.num_blocks:
                raise FuzzError(f"the pool of {name} has not all its blocks back: {stats}")
        self.check()


def census(node: Node, fleet: Collection[str]) -> tuple[int, ...]:
    """Return how many links of strangers a node has, what it has asked and serves, and its handlers for other nodes.

    Links that it has dialled to the fuzzer do not count: who cannot know whether a writer lives goes on asking for it.
    """
    links = [link for link in node._links._links if link.endpoint != FUZZ_ADDRESS[1]]
    return (
        sum(not link.endpoint and link.peer_node not in fleet for link in links),
        sum(len(link.asked) for link in links),
        sum(len(link.served) for link in links),
        sum(served.link is not node._local for served in node._server._serving),
    )


def num_refused(world: World) -> int:
    """Return what all nodes say they have turned away."""
    return sum(node._links.num_refused + node._server.num_refused for node in world.fleet.nodes.values())


def rss_mib() -> float:
    """Return this process's resident memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@asynccontextmanager
async def fuzzed_fleet(corpus: Corpus, seed: int) -> AsyncIterator[World]:
    """Start a fleet, a parrot on each of its nodes, and the peer that bothers them."""
    hub, alarm = InprocHub(), Alarm()
    log = logging.getLogger("callboard")
    log.addHandler(alarm)
    log.propagate, before = False, log.propagate
    try:
        async with running_fleet(
            layout=LAYOUT, hub=hub, clock=VirtualClock(), seed=SEED, num_blocks=NUM_BLOCKS, lease_s=1.0
        ) as fleet:
            for node in fleet.nodes.values():
                node.add("parrot", Parrot())
            for actor in fleet.actors.values():
                if isinstance(actor, KvManager):
                    # An impostor makes the engine write where it must not; the books are right all the same.
                    actor.blocks.allocator.pool.watch = None
            endpoints = [node.endpoint for name, node in fleet.nodes.items() if name != "client"]
            peer = Peer(hub, Mutator(random.Random(seed), corpus), endpoints, "test")
            await peer.start()
            world = World(fleet, peer, alarm)
            asyncio.get_running_loop().set_exception_handler(
                lambda _, context: world.loop_problems.append(f"{context.get('message')}: {context.get('exception')!r}")
            )
            await fleet.generate([1, *range(40)])
            await world.ask_honestly()
            await asyncio.sleep(30)
            world.note_calm()
            try:
                yield world
            finally:
                await peer.stop()
    finally:
        log.removeHandler(alarm)
        log.propagate = before


async def fuzz(corpus: Corpus, seed: int, messages: int, progress: Callable[[int], None]) -> Totals:
    """Send so many batches; return the totals. Raises FuzzError."""
    async with fuzzed_fleet(corpus, seed) as world:
        peer = world.peer
        rss_early = 0.0
        num_bursts = 0
        try:
            while peer.counts["sent"] < messages:
                await world.burst(min(BURST, messages - peer.counts["sent"]))
                num_bursts += 1
                progress(peer.counts["sent"])
                if num_bursts % HONEST_EVERY == 0:
                    await world.ask_honestly()
                if not rss_early and peer.counts["sent"] >= messages / 5:
                    rss_early = rss_mib()
            growth = rss_mib() - rss_early
            peer.used.clear()
            await world.settle()
        except FuzzError as error:
            lines = [(line.endpoint, list(line.log)) for line in peer.used if line.endpoint]
            raise FuzzError(str(error), peer.counts["sent"], lines) from None
        return Totals(peer.counts, num_refused(world), growth, world.alarm.num_lines)


async def replay(corpus: Corpus, lines: list[tuple[str, list[bytes]]]) -> None:
    """Send what was sent over some lines to a new fleet, line by line. Raises FuzzError."""
    async with fuzzed_fleet(corpus, 0) as world:
        for endpoint, batches in lines:
            world.loop.num_passes = 0
            world.peer.replay(endpoint, batches)
            await asyncio.sleep(1)
            world.check()
        await world.ask_honestly()


def on_fuzz_loop(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``main()`` on a loop of its own."""
    with asyncio.Runner(loop_factory=FuzzLoop) as runner:
        return runner.run(main())
