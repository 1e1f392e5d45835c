"""What do frontend and router take of a request and of each of its events, against vllm-router's proxy in Rust?

Both serve OpenAI's completions over HTTP from two workers that compute nothing. Callboard's side is what ``callboard
up`` starts: launcher apart, all processes count (frontend and router, directory, KV managers, simulated engines).
vllm-router's side is its process and two mock workers, twice: ``fastapi`` is built as vLLM's server is, ``raw`` writes
ready-made bytes, which no server that makes text of tokens can do. Every token is one event on each side. What
Callboard does besides for each of them: it tokenises, makes text of tokens, keeps KV blocks and a prefix cache.

Sides take turns in each round, ask by ask. ``requests``: single tokens, not streamed, on 32 connections that wait for
their answers. ``events``: 64 streams at a time of a token every 20 ms, as engines under load give them, and as fast as
they come. ``TTFT``: streams one after the other on one connection that is kept, head and body of each request written
apart; what is added is told against asking the worker itself, of Callboard the engine over the bus. The client is one
process on the same cores, and its own time is not counted.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import uvloop
from _report import arguments, goal, percentile, report
from _router import client
from _router.sides import KINDS, Side, lacks_peer, node_beside, running_fleet, running_peer

from callboard.actors.protocol import SamplingParams, StartGenerate
from callboard.bus import Node
from callboard.kv.tokens import pack_tokens

AT_ONCE = 32
STREAMS = 64
PACED_EVENTS = 64
FREE_EVENTS = 256
DIRECT_PROMPT = pack_tokens(range(100, 120))
CPU = {"request_us": "request", "event_us": "paced event", "free_event_us": "free event"}
STALL_S = 0.035
"""A first token that took longer waited for a delayed acknowledgement, which Linux sends after 40 ms."""


@dataclass
class Found:
    """What a side gave, a value for each round."""

    requests_per_s: list[float] = field(default_factory=list)
    request_us: list[tuple[float, float]] = field(default_factory=list)
    """Processor time of a request: the workers', and everybody else's."""
    event_us: list[tuple[float, float]] = field(default_factory=list)
    free_event_us: list[tuple[float, float]] = field(default_factory=list)
    events_per_s: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    added_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    """The TTFT that one in a hundred exceeds."""
    stalled: list[float] = field(default_factory=list)
    """The share of first tokens that took longer than STALL_S."""


@dataclass
class Measurer:
    """Measures sides. ``scale`` shortens everything."""

    seconds: float
    scale: float

    async def requests(self, side: Side, found: Found) -> None:
        """Measure how many requests a second, and what each takes."""
        before = side.cpu_s()
        load = await client.requests_for(side.port, AT_ONCE, self.seconds)
        found.requests_per_s.append(len(load.answers) / load.seconds)
        found.request_us.append(_per(before, side.cpu_s(), len(load.answers)))

    async def events(self, side: Side, found: Found) -> None:
        """Measure what an event takes of streams that are paced, and of streams that are not."""
        before = side.cpu_s()
        load = await client.streams(side.port, "paced", STREAMS, self._scaled(PACED_EVENTS))
        found.event_us.append(_per(before, side.cpu_s(), load.num_events))
        before = side.cpu_s()
        load = await client.streams(side.port, "free", STREAMS, self._scaled(FREE_EVENTS))
        found.free_event_us.append(_per(before, side.cpu_s(), load.num_events))
        found.events_per_s.append(load.num_events / load.seconds)

    async def ttft(self, side: Side, found: Found, node: Node | None) -> None:
        """Measure the time to the first token, through all of the side and past it."""
        count = self._scaled(200)
        half = count // 2
        through, direct = await client.one_by_one(side.port, half), []
        if node is not None and side.engine is not None:
            direct = await _engine_alone(node, side, count)
        elif side.worker_ports:
            direct = await client.one_by_one(side.worker_ports[0], count)
        through += await client.one_by_one(side.port, half)
        found.ttft_ms.append(1e3 * median(through))
        found.late_ms.append(1e3 * percentile(through, 0.99))
        found.stalled.append(fmean(seconds > STALL_S for seconds in through))
        if direct:
            found.added_ms.append(1e3 * (median(through) - median(direct)))

    def _scaled(self, count: int) -> int:
        return max(2, round(self.scale * count))


async def _engine_alone(node: Node, side: Side, count: int) -> list[float]:
    """Return the seconds to the first token of an engine that is asked over the bus, one request after the other."""
    assert side.engine is not None
    engine, found, now = node.ref(side.engine), [], node.clock.now
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    for _ in range(count):
        begin, first = now(), 0.0
        async with engine.stream(StartGenerate(node.new_id(), 0, DIRECT_PROMPT, sampling), timeout=10) as tokens:
            async for _ in tokens:
                first = first or now() - begin
        found.append(first)
    return found


def _per(before: tuple[float, float], after: tuple[float, float], count: int) -> tuple[float, float]:
    """Return the microseconds of each."""
    workers, others = (1e6 * (late - early) / count for early, late in zip(before, after, strict=True))
    return workers, others


# ---- what is told --------------------------------------------------------------------------------------------------


def row(name: str, found: Found) -> dict[str, object]:
    """Return a side's row of the table."""

    cells: dict[str, object] = {"side": name, "requests/s": median(found.requests_per_s)}
    for what, name_of in CPU.items():
        pairs = getattr(found, what)
        cells |= {
            f"CPU us a {name_of}": median(map(sum, pairs)),
            f"of a {name_of} workers": median(w for w, _ in pairs),
        }
    cells |= {"events/s": median(found.events_per_s), "TTFT ms": median(found.ttft_ms)}
    cells |= {"added TTFT ms": median(found.added_ms) if found.added_ms else None, "TTFT P99 ms": median(found.late_ms)}
    return cells


def goals(found: dict[str, Found]) -> list[dict[str, object]]:
    """Return the goals: ratios of the same round."""
    ours = found["Callboard"]
    items = []
    peers = {name: each for name, each in found.items() if not name.startswith("Callboard")}
    for what in CPU:
        for name, each in peers.items():
            ratios = _ratios([*map(sum, getattr(ours, what))], [*map(sum, getattr(each, what))])
            items.append(goal(f"CPU of a {CPU[what]} over that of {name}", ratios, "<= 1"))
    items.append(goal("TTFT added to the engine's, ms", ours.added_ms, "<= 1"))
    items.append(goal(f"share of first tokens after {1e3 * STALL_S:.0f} ms, connection kept", ours.stalled, "<= 0.01"))
    for name, each in found.items():
        if name.startswith("Callboard,"):
            gain = _ratios(each.requests_per_s, ours.requests_per_s)
            items.append(goal(f"requests/s with {name.split(', ')[1]}, over one", gain, ">= 1.2"))
    return items


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [one / other for one, other in zip(ours, theirs, strict=True)]


# ---- the run -------------------------------------------------------------------------------------------------------


async def measure(
    folder: Path, rounds: int, measurer: Measurer, frontends: list[int], say: Callable[[str], None]
) -> dict[str, Found]:
    """Start all sides, and measure them in turn."""
    async with AsyncExitStack() as stack:
        fleets = [await stack.enter_async_context(running_fleet(folder, count)) for count in frontends]
        peers = []
        if reason := lacks_peer():
            say(f"vllm-router is left out: {reason}")
        else:
            peers = [await stack.enter_async_context(running_peer(kind)) for kind in KINDS]
        sides = [*fleets, *peers]
        node = await stack.enter_async_context(node_beside(fleets[0], folder))
        found = {side.name: Found() for side in sides}
        for number in range(rounds + 1):
            say(f"round {number} of {rounds}" if number else "warm-up")
            # What the warm-up finds is thrown away.
            into = found if number else {side.name: Found() for side in sides}
            turns = sides if number % 2 else sides[::-1]
            for side in turns:
                await measurer.requests(side, into[side.name])
            for side in turns:
                await measurer.events(side, into[side.name])
            for side in turns:
                await measurer.ttft(side, into[side.name], node if side is fleets[0] else None)
    return found


def main() -> None:
    options = arguments(
        __doc__ or "",
        rounds={"type": int, "help": "rounds (7, quick 1)"},
        seconds={"type": float, "help": "seconds that requests are asked for (2, quick 0.5)"},
        frontends={"default": "1,2", "help": "how many frontends, with commas (%(default)s); the first must be 1"},
    )
    rounds, seconds = options.rounds or (1 if options.quick else 7), options.seconds or (0.5 if options.quick else 2.0)
    frontends = [int(count) for count in options.frontends.split(",")]
    if frontends[0] != 1:
        raise SystemExit(f"--frontends {options.frontends}: begin with 1, which the others are compared with")
    measurer = Measurer(seconds, min(1.0, seconds / 2))

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="callboard-bench-") as folder:
        found = uvloop.run(measure(Path(folder), rounds, measurer, frontends, say))
    report("router", [row(name, each) for name, each in found.items()], goals(found), options.json)


if __name__ == "__main__":
    main()
