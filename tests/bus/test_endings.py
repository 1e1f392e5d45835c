"""Every ask and stream ends exactly once, whatever happens to it and in whatever order."""

import asyncio
from collections.abc import AsyncIterator
from random import Random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from callboard.bus import Ask, BusError, LinkConfig, Node, Refusal, Stream, VirtualClock
from callboard.bus.testing import run_virtual
from callboard.bus.transports.sim import SimHub


class Work(Ask[int], frozen=True):
    seconds: float
    fails: bool


class Numbers(Stream[int], frozen=True):
    count: int
    seconds: float
    fails: bool


class Tired(Refusal):
    sentence = "too tired"


class Worker:
    async def on_work(self, message: Work) -> int:
        await asyncio.sleep(message.seconds)
        if message.fails:
            raise Tired
        return 1

    async def on_numbers(self, message: Numbers) -> AsyncIterator[int]:
        for i in range(message.count):
            await asyncio.sleep(message.seconds)
            yield i
        if message.fails:
            raise Tired


async def story(seed: int, num_calls: int, stop_at: float | None) -> list[str]:
    """Run calls with random fates; return the log of everything the client node sent and received."""
    rng = Random(seed)
    hub = SimHub(seed)
    log: list[str] = []
    ends: list[int] = []

    def node(name: str) -> Node:
        return Node(
            name,
            endpoint=f"sim://{name}",
            transport=hub.transport(),
            seed=seed,
            clock=VirtualClock(),
            links=LinkConfig(dial_s=0.01),
        )

    async with node("server") as server, node("client") as client:
        client.follow(lambda row, _: log.append(repr(msgspec.msgpack.encode(row))), everything=True)
        ref = client.ref(server.add("worker", Worker()).address)

        async def one(i: int) -> None:
            seconds, fails = rng.choice([0.0, 0.001, 0.5]), rng.random() < 0.3
            timeout, patience = rng.choice([0.0005, 0.01, 5.0]), rng.choice([0.0, 0.0006, 10.0])
            try:
                async with asyncio.timeout(patience):
                    if rng.random() < 0.5:
                        await ref.ask(Work(seconds, fails), timeout=timeout)
                    else:
                        async with ref.stream(Numbers(7, seconds, fails), timeout=timeout, credit=2) as items:
                            assert [n async for n in items] == list(range(7))
            except (BusError, TimeoutError):
                pass
            ends.append(i)

        async with asyncio.TaskGroup() as group:
            for i in range(num_calls):
                group.create_task(one(i))
            if stop_at is not None:
                await asyncio.sleep(stop_at)
                await server.stop()
        await asyncio.sleep(1)
        assert sorted(ends) == list(range(num_calls))
        for side in (server, client):
            assert not side._server._serving
            for link in side._links._by_connection.values():
                assert not link.asked
                assert not link.served
    return log


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30), st.none() | st.floats(0, 0.6))
def test_every_call_ends_once_and_leaves_nothing(seed: int, num_calls: int, stop_at: float | None) -> None:
    run_virtual(lambda: story(seed, num_calls, stop_at))


def test_the_same_seed_gives_the_same_log() -> None:
    first, second = (run_virtual(lambda: story(7, 25, 0.3)) for _ in range(2))
    assert first == second
    assert first != run_virtual(lambda: story(8, 25, 0.3))
