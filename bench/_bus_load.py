"""The load every side of bench/bus.py carries, and how it is measured: the same loops, clocks and counts for all.

A side has a client in a process of its own, which takes orders as lines of JSON on stdin (``Order``) and answers each
with what it measured (``Measured``). Three measures: *latency*, one request after the other; *requests*, 256 in
flight, each sent when the one before it in its place was answered; *events*, 64 streams, each read to its end.
"""

import asyncio
import gc
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from callboard.bus import Ask, Message, Stream
from callboard.kv.tokens import pack_tokens

TEXT = "x" * 280
"""With its envelope about 300 bytes."""
TOKENS = pack_tokens(range(100_000, 100_512))
"""512 token ids as prompts have them. Packed once: a prompt passes several hops as it is."""
IN_FLIGHT = 256
STREAMS = 64
MAX_BATCH_BYTES = 64 * 1024
TURN = 8
"""Events after which a producer that runs freely lets the others run."""


class Reply(Message, frozen=True):
    text: str


class Echo(Ask[Reply], frozen=True):
    """Answered by a coroutine."""

    text: str


class InlineEcho(Ask[Reply], frozen=True):
    """Answered by a plain function, where a side has such handlers."""

    text: str


class TokensReply(Message, frozen=True):
    tokens: bytes


class EchoTokens(Ask[TokensReply], frozen=True):
    tokens: bytes


class Event(Message, frozen=True):
    index: int
    text: str


class Steps(Stream[Event], frozen=True):
    """Asks for ``count`` events, one in each pass of the server's loop, as the steps of an engine give them."""

    count: int


class Free(Stream[Event], frozen=True):
    """Asks for ``count`` events, from a producer that runs freely: all it does is to let others run at times."""

    count: int


class Order(msgspec.Struct):
    """What to measure: ``measure`` and ``kind`` name it; latency and requests last ``seconds``."""

    measure: str
    kind: str = ""
    seconds: float = 0.0
    count: int = 0
    """Events of each stream."""


class Measured(msgspec.Struct):
    """``seconds`` are of the clock, ``cpu_s`` of all processes of the side together."""

    num_messages: int
    seconds: float
    p50_s: float = 0.0
    p99_s: float = 0.0
    cpu_s: float = 0.0


Asker = Callable[[], Awaitable[Any]]
"""Sends one request and returns its reply."""
Listener = Callable[[int], Awaitable[None]]
"""Reads 64 streams of so many events to their ends, a task each. Raises if an event is missing."""


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the processor time of processes so far, all threads, in seconds."""
    # What glibc's clock_getcpuclockid returns: nanoseconds, where /proc counts in hundredths of a second.
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def out_of_order(index: int, expected: int) -> RuntimeError:
    """Return the error of a stream that gave another event than the next one."""
    return RuntimeError(f"event {index} came where {expected} was next")


def check_count(num_events: int, count: int) -> None:
    """Raise unless a stream gave all of its events."""
    if num_events != count:
        raise RuntimeError(f"{num_events} events of {count} arrived")


def check_reply(reply: Any) -> None:
    """Raise unless a request was answered with what it carried."""
    if reply.text != TEXT if hasattr(reply, "text") else reply.tokens != TOKENS:
        raise RuntimeError(f"a wrong reply: {reply!r:.100}")


def latency_of(times: list[float]) -> Measured:
    """Return what a list of latencies says."""
    times.sort()
    return Measured(len(times), sum(times), times[len(times) // 2], times[int(0.99 * len(times))])


def all_streams(listen: Callable[[int, int], Awaitable[None]]) -> Listener:
    """Return a Listener made of one that reads one stream, given its number and count."""

    async def listen_to_all(count: int) -> None:
        await asyncio.gather(*(listen(stream, count) for stream in range(STREAMS)))

    return listen_to_all


async def measure_latency(ask: Asker, seconds: float) -> Measured:
    """Ask one by one."""
    clock = time.perf_counter
    times = []
    end = clock() + seconds
    stop = 0.0
    while stop < end:
        start = clock()
        reply = await ask()
        stop = clock()
        times.append(stop - start)
    check_reply(reply)
    return latency_of(times)


async def measure_requests(ask: Asker, seconds: float) -> Measured:
    """Keep 256 requests in flight."""
    clock = time.perf_counter
    start = clock()
    end = start + seconds

    async def place() -> int:
        num_replies = 0
        while not num_replies or clock() < end:
            reply = await ask()
            num_replies += 1
        check_reply(reply)
        return num_replies

    num_replies = sum(await asyncio.gather(*(place() for _ in range(IN_FLIGHT))))
    return Measured(num_replies, clock() - start)


async def measure_events(listen: Listener, count: int) -> Measured:
    """Read 64 streams to their ends."""
    start = time.perf_counter()
    await listen(count)
    return Measured(STREAMS * count, time.perf_counter() - start)


def settle() -> None:
    """Leave what was imported out of garbage collections: no side pays for how much that was."""
    gc.collect()
    gc.freeze()


def ready() -> None:
    """Tell bench/bus.py that this process is up."""
    settle()
    print("ready", flush=True)


async def follow_orders(askers: dict[str, Asker], listeners: dict[str, Listener], pids: Sequence[int]) -> None:
    """Measure what stdin asks for, on the running loop, until stdin ends."""
    stdin = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    ready()
    while line := await stdin.readline():
        order = msgspec.json.decode(line, type=Order)
        gc.collect()
        cpu = cpu_seconds(pids)
        if order.measure == "latency":
            measured = await measure_latency(askers[order.kind], order.seconds)
        elif order.measure == "requests":
            measured = await measure_requests(askers[order.kind], order.seconds)
        else:
            measured = await measure_events(listeners[order.kind], order.count)
        answer(measured, cpu_seconds(pids) - cpu)


def follow_orders_blocking(measures: dict[str, Callable[[Order], Measured]], pids: Sequence[int]) -> None:
    """Measure what stdin asks for, without an event loop, until stdin ends."""
    ready()
    for line in sys.stdin:
        order = msgspec.json.decode(line, type=Order)
        gc.collect()
        cpu = cpu_seconds(pids)
        measured = measures[f"{order.measure} {order.kind}".strip()](order)
        answer(measured, cpu_seconds(pids) - cpu)


def answer(measured: Measured, cpu_s: float) -> None:
    """Print what was measured."""
    measured.cpu_s = cpu_s
    print(msgspec.json.encode(measured).decode(), flush=True)
