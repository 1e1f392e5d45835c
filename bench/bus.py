"""How far is the bus from raw ZeroMQ?

Two processes over ``ipc://``, messages of about 300 bytes. The floor is blocking pyzmq, one message at a time, no
event loop: the least latency that ZeroMQ gives Python. Callboard goes through its public ask and stream, with
handlers that are plain functions and handlers that are coroutines. Rounds alternate; ratios are of the same round.
"""

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from typing import Any

import uvloop
import zmq
from _report import arguments, goal, median, percentile, report, spread

from callboard.bus import Address, Ask, Message, Node, Stream

TEXT = "x" * 280
IN_FLIGHT = 256
STREAMS = 64


class Reply(Message, frozen=True):
    text: str


class Inline(Ask[Reply], frozen=True):
    text: str


class Task(Ask[Reply], frozen=True):
    text: str


class Events(Stream[Reply], frozen=True):
    count: int


class Server:
    """The far side."""

    def on_inline(self, message: Inline) -> Reply:
        return Reply(message.text)

    async def on_task(self, message: Task) -> Reply:
        return Reply(message.text)

    async def on_events(self, message: Events) -> AsyncIterator[Reply]:
        reply = Reply(TEXT)
        for i in range(message.count):
            yield reply
            if i % 8 == 0:
                await asyncio.sleep(0)


async def serve_callboard(endpoint: str) -> None:
    async with Node("server", endpoint=endpoint) as node:
        node.add("server", Server())
        print("ready", flush=True)
        await asyncio.Event().wait()


def serve_floor(endpoint: str) -> None:
    """Echo; a message that begins with ``S`` asks for that many events."""
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.SNDHWM, 0)
    router.bind(endpoint)
    print("ready", flush=True)
    event = TEXT.encode()
    while True:
        peer, body = router.recv_multipart()
        if body[:1] == b"S":
            for _ in range(int(body[1:])):
                router.send_multipart((peer, event))
        else:
            router.send_multipart((peer, body))


class Floor:
    """The near side of blocking pyzmq."""

    def __init__(self, endpoint: str) -> None:
        self.dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.dealer.setsockopt(zmq.LINGER, 0)
        self.dealer.setsockopt(zmq.RCVHWM, 0)
        self.dealer.connect(endpoint)

    def round(self, scale: int) -> dict[str, float]:
        body = TEXT.encode()
        times = []
        for _ in range(2 * scale):
            start = time.perf_counter()
            self.dealer.send(body)
            self.dealer.recv()
            times.append(time.perf_counter() - start)
        total = 10 * scale
        start = time.perf_counter()
        for _ in range(IN_FLIGHT):
            self.dealer.send(body)
        for _ in range(total - IN_FLIGHT):
            self.dealer.recv()
            self.dealer.send(body)
        for _ in range(IN_FLIGHT):
            self.dealer.recv()
        requests = total / (time.perf_counter() - start)
        start = time.perf_counter()
        self.dealer.send(b"S%d" % (20 * scale))
        for _ in range(20 * scale):
            self.dealer.recv()
        return _numbers(times, requests, 20 * scale / (time.perf_counter() - start))


async def callboard_round(client: Node, endpoint: str, kind: type[Any], scale: int) -> dict[str, float]:
    ref = client.ref(Address("server", endpoint, "server"))
    times = []
    for _ in range(2 * scale):
        start = time.perf_counter()
        await ref.ask(kind(TEXT))
        times.append(time.perf_counter() - start)

    async def ask(count: int) -> None:
        for _ in range(count):
            await ref.ask(kind(TEXT))

    each = 10 * scale // IN_FLIGHT
    start = time.perf_counter()
    await asyncio.gather(*(ask(each) for _ in range(IN_FLIGHT)))
    requests = each * IN_FLIGHT / (time.perf_counter() - start)

    async def listen(count: int) -> None:
        async with ref.stream(Events(count)) as items:
            async for _ in items:
                pass

    each = 20 * scale // STREAMS
    start = time.perf_counter()
    await asyncio.gather(*(listen(each) for _ in range(STREAMS)))
    return _numbers(times, requests, each * STREAMS / (time.perf_counter() - start))


def _numbers(times: list[float], requests: float, events: float) -> dict[str, float]:
    return {
        "p50 us": 1e6 * median(times),
        "p99 us": 1e6 * percentile(times, 0.99),
        "requests/s": requests,
        "events/s": events,
    }


async def main() -> None:
    options = arguments(__doc__ or "", rounds={"type": int, "default": 7})
    rounds, scale = (3, 500) if options.quick else (options.rounds, 2000)
    done: dict[str, list[dict[str, float]]] = {"floor": [], "plain functions": [], "coroutines": []}
    with tempfile.TemporaryDirectory() as folder:
        servers = []
        for side in ("floor", "callboard"):
            command = [sys.executable, __file__, side, f"ipc://{folder}/{side}"]
            servers.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        try:
            for server in servers:
                assert server.stdout is not None
                assert server.stdout.readline() == b"ready\n"
            floor, endpoint = Floor(f"ipc://{folder}/floor"), f"ipc://{folder}/callboard"
            async with Node("client") as client:
                floor.round(200)
                await callboard_round(client, endpoint, Task, 200)
                for _ in range(rounds):
                    done["floor"].append(floor.round(scale))
                    done["plain functions"].append(await callboard_round(client, endpoint, Inline, scale))
                    done["coroutines"].append(await callboard_round(client, endpoint, Task, scale))
        finally:
            for server in servers:
                server.kill()
                server.wait()
    _report(done, options.json)


def _report(done: dict[str, list[dict[str, float]]], path: str | None) -> None:
    def ratios(side: str, name: str) -> list[float]:
        return [mine[name] / its[name] for mine, its in zip(done[side], done["floor"], strict=True)]

    rows = []
    for side, found in done.items():
        row: dict[str, Any] = {"side": side}
        for name in found[0]:
            row[name] = median([each[name] for each in found])
            row[f"{name} over floor"] = spread(ratios(side, name))
        rows.append(row)
    limits = {"plain functions": ("<= 1.3", ">= 1.5"), "coroutines": ("<= 1.5", ">= 1.0")}
    goals = []
    for side, (p50, requests) in limits.items():
        goals.append(goal(f"{side}: p50 over floor", median(ratios(side, "p50 us")), p50))
        goals.append(goal(f"{side}: requests/s over floor", median(ratios(side, "requests/s")), requests))
    goals.append(goal("events/s over floor", median(ratios("coroutines", "events/s")), ">= 5.0"))
    report("bus", rows, goals, path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["floor"]:
        serve_floor(sys.argv[2])
    elif sys.argv[1:2] == ["callboard"]:
        uvloop.run(serve_callboard(sys.argv[2]))
    else:
        uvloop.run(main())
