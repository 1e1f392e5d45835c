"""What does it cost that messages can be watched?

Two nodes of one process exchange a million messages of each kind over the inproc transport, in turns: with the tap
cut out of the code, with nobody attached, with a tracer attached as ``callboard trace`` does it (requests), and with
one that wants everything (``--all``). CPU per message, all of it in one process; what a tracer's own process does
with the records is not counted. Of messages that belong to a request, nodes keep records whether anybody watches or
not: their rows compare with that.
"""

import asyncio
import gc
import inspect
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import uvloop
from _report import arguments, goal, median, report

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.trace_protocol import TRACER, Follow
from callboard.actors.tracer import Tracer
from callboard.bus import Ask, Message, Node, Ref, Tell
from callboard.bus.calls import PendingAsk
from callboard.bus.serving import Server
from callboard.bus.transports.inproc import InprocHub

AT_ONCE = 50
NUM_REQUESTS = 500
TEXT = "x" * 250


class Told(Tell, frozen=True):
    number: int
    text: str


class ToldForRequest(Tell, frozen=True):
    number: int
    text: str
    request_id: str


class Reply(Message, frozen=True):
    number: int


class Asked(Ask[Reply], frozen=True):
    number: int
    text: str


class AskedForRequest(Ask[Reply], frozen=True):
    number: int
    text: str
    request_id: str


class Receiver:
    num_told = 0

    def on_told(self, message: Told) -> None:
        self.num_told += 1

    def on_told_for_request(self, message: ToldForRequest) -> None:
        self.num_told += 1

    def on_asked(self, message: Asked) -> Reply:
        return Reply(message.number)

    def on_asked_for_request(self, message: AskedForRequest) -> Reply:
        return Reply(message.number)


# ---- without the tap ---------------------------------------------------------------------------------------------

CUTS: list[tuple[type, str, str, str]] = [
    (Node, "send_tell", "if request_id or self.tap is not None:", "if request_id:"),
    (Node, "_start", "if request_id or self.tap is not None:", "if request_id:"),
    (Server, "_on_post", "if is_traced:", "if False:"),
    (Server, "_run_inline", "if served.span:", "if False:"),
    (PendingAsk, "answer", "if self.note is not None:", "if False:"),
]
"""Every test that watching costs a message that nobody watches."""


def _cut(function: Any, old: str, new: str) -> Any:
    source = textwrap.dedent(inspect.getsource(function))
    if old not in source:
        raise SystemExit(f"{function.__qualname__} has changed: there is no {old!r} in it any more")
    namespace = dict(function.__globals__)
    exec(compile(source.replace(old, new), function.__qualname__, "exec"), namespace)
    return namespace[function.__name__]


@contextmanager
def cut_out() -> Iterator[None]:
    """Run the body with a bus that knows no tap."""
    kept = [(kind, name, kind.__dict__[name]) for kind, name, _, _ in CUTS]
    for kind, name, old, new in CUTS:
        setattr(kind, name, _cut(kind.__dict__[name], old, new))
    try:
        yield
    finally:
        for kind, name, function in kept:
            setattr(kind, name, function)


# ---- one measurement ---------------------------------------------------------------------------------------------


async def tell(ref: Ref, receiver: Receiver, count: int, make: Callable[[int], Tell]) -> float:
    receiver.num_told = 0
    begin = time.process_time()
    for number in range(count):
        ref.tell(make(number))
        if number % AT_ONCE == 0:
            await asyncio.sleep(0)
    while receiver.num_told < count:  # noqa: ASYNC110
        await asyncio.sleep(0)
    return (time.process_time() - begin) / count


async def ask(ref: Ref, receiver: Receiver, count: int, make: Callable[[int], Ask[Reply]]) -> float:
    async def some(first: int) -> None:
        for number in range(first, count, AT_ONCE):
            await ref.ask(make(number))

    begin = time.process_time()
    await asyncio.gather(*(some(first) for first in range(AT_ONCE)))
    return (time.process_time() - begin) / count / 2  # An ask is two messages.


KINDS: dict[str, tuple[Any, Any]] = {
    "tell": (tell, lambda number: Told(number, TEXT)),
    "ask and answer": (ask, lambda number: Asked(number, TEXT)),
    "tell of a request": (tell, lambda number: ToldForRequest(number, TEXT, f"request-{number % NUM_REQUESTS}")),
    "ask of a request": (ask, lambda number: AskedForRequest(number, TEXT, f"request-{number % NUM_REQUESTS}")),
}
SIDES = ("cut out", "nobody attached", "attached", "attached, everything")


async def follow(tracer: Tracer, message: Follow) -> None:
    """Do what the node of a tracer does for one who follows: gather, encode."""
    encode = msgspec.msgpack.Encoder().encode
    async for records in tracer.on_follow(message):
        encode(records)


@contextmanager
def attached(tracers: list[Tracer], *, everything: bool) -> Iterator[None]:
    message = Follow(with_past=False, everything=everything)
    tasks = [asyncio.ensure_future(follow(tracer, message)) for tracer in tracers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


async def measure(kind: str, side: str, sender: Ref, receiver: Receiver, tracers: list[Tracer], count: int) -> float:
    """Return the seconds of CPU a message."""
    run, make = KINDS[kind]
    gc.collect()
    if side == "cut out":
        with cut_out():
            return float(await run(sender, receiver, count, make))
    if side == "nobody attached":
        return float(await run(sender, receiver, count, make))
    with attached(tracers, everything=side != "attached"):
        await asyncio.sleep(0.02)
        took = float(await run(sender, receiver, count, make))
    await asyncio.sleep(0.02)
    return took


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95% interval of the median by its ranks (binomial; for 20 values the 6th and the 15th)."""
    ranked, count = sorted(values), len(values)
    off = int(0.98 * count**0.5) + 1
    low = max(0, count // 2 - off)
    return ranked[low], ranked[count - 1 - low]


async def main() -> None:
    options = arguments(__doc__ or "", rounds={"type": int, "default": 20, "help": "rounds (default 20)"})
    rounds, count = (6, 10_000) if options.quick else (options.rounds, 50_000)
    hub, receiver = InprocHub(), Receiver()
    took: dict[tuple[str, str], list[float]] = {(kind, side): [] for kind in KINDS for side in SIDES}
    async with (
        Node("a", endpoint="inproc://a", transport=hub.transport()) as a,
        Node("b", endpoint="inproc://b", transport=hub.transport()) as b,
    ):
        tracers = [Tracer(), Tracer()]
        for node, tracer in zip((a, b), tracers, strict=True):
            await start_actor(node, TRACER, tracer)
        ref = b.ref(a.add("receiver", receiver).address)
        for number in range(rounds):
            for kind in KINDS:
                sides = SIDES if kind in ("tell", "ask and answer") else SIDES[1:3]
                for side in sides if number % 2 else sides[::-1]:
                    took[kind, side].append(await measure(kind, side, ref, receiver, tracers, count))
        for tracer in tracers:
            await stop_actor(tracer)
    rows, goals = [], []
    for kind in KINDS:
        base = SIDES[0] if took[kind, SIDES[0]] else SIDES[1]
        for side in SIDES:
            times = took[kind, side]
            if not times:
                continue
            more = [100 * (x / y - 1) for x, y in zip(times, took[kind, base], strict=True)]
            low, high = interval(more)
            row: dict[str, Any] = {"messages": kind, "tap": side, "us a message": 1e6 * median(times)}
            if side != base:
                row |= {"more %": median(more), "95% interval": f"{low:.1f} to {high:.1f}"}
                if side == "nobody attached":
                    row["verdict"] = "not resolvable here" if high - low > 4 or low <= 0 <= high else "resolved"
                    goals.append(goal(f"{kind}: % more with nobody attached", more, "<= 2"))
                elif side == "attached":
                    goals.append(goal(f"{kind}: % more with a tracer attached", more, "<= 15"))
                else:
                    goals.append(goal(f"{kind}: % more with a tracer of everything", more, "<= 15"))
            rows.append(row)
    report("taps", rows, goals, options.json)


if __name__ == "__main__":
    uvloop.run(main())
