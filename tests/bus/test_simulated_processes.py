"""Processes and network of a simulation: what a pause, a kill, a break and a partition are, exactly."""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any

import pytest

from callboard.bus import Ask, AskTimeout, LinkLost, Message, Node, Ref, VirtualClock
from callboard.bus.errors import ActorDied
from callboard.bus.links import LinkConfig
from callboard.bus.testing import SimulatedProcess, VirtualLoop, current_process, run_virtual
from callboard.bus.transports.sim import Break, SimHub, Weather


class Counted(Message, frozen=True):
    number: int


class Count(Ask[Counted], frozen=True):
    number: int


class Counter:
    """Answers with the number it was asked, after a while."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.heard: list[int] = []

    async def on_count(self, message: Count) -> Counted:
        self.heard.append(message.number)
        await asyncio.sleep(self.seconds)
        return Counted(message.number)


class Pair:
    """A caller without a process of its own, and a counter in one that can be paused and killed."""

    def __init__(self, *, weather: Weather | None = None, is_one_host: bool = False) -> None:
        self.hub = SimHub(7, weather=weather, is_one_host=is_one_host)
        self.counter = Counter()
        self.process = SimulatedProcess("far")

    async def start(self) -> Ref:
        self.near, far = self._node("near"), self._node("far")
        await self.near.__aenter__()
        started = asyncio.get_running_loop().create_future()

        async def serve() -> None:
            await far.__aenter__()
            started.set_result(far.add("counter", self.counter))

        self.process.spawn(serve())
        ref = self.near.ref((await started).address)
        await ref.ask(Count(0))
        return ref

    def _node(self, name: str) -> Node:
        return Node(
            name,
            endpoint=f"sim://{name}",
            transport=self.hub.transport(),
            clock=VirtualClock(),
            seed=1,
            links=LinkConfig(ping_s=0.5, silent_s=2.0, hello_s=1.0, dial_s=0.3),
        )


def in_virtual_time(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    def run(**arguments: Any) -> None:
        run_virtual(lambda: test(**arguments))  # type: ignore[arg-type, return-value]

    run.__name__ = test.__name__
    run.__signature__ = __import__("inspect").signature(test)  # type: ignore[attr-defined]
    return run


def now() -> float:
    return asyncio.get_running_loop().time()


@in_virtual_time
async def test_what_a_process_starts_belongs_to_it_also_from_an_empty_context() -> None:
    process, seen = SimulatedProcess("p"), []

    async def inner() -> None:
        seen.append(current_process())

    async def main() -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(asyncio.ensure_future(inner()), Context().run(loop.create_task, inner()))

    await process.spawn(main())
    assert seen == [process, process]
    assert current_process() is None


@in_virtual_time
async def test_a_paused_process_does_nothing_and_then_all_in_order() -> None:
    process, done = SimulatedProcess("p"), []

    async def work(number: int) -> None:
        await asyncio.sleep(number)
        done.append((number, now()))

    for number in (3, 1, 2):
        process.spawn(work(number))
    await asyncio.sleep(1.5)
    process.pause()
    await asyncio.sleep(8.5)
    assert done == [(1, 1.0)]
    process.resume()
    await asyncio.sleep(0.1)
    assert done == [(1, 1.0), (2, 10.0), (3, 10.0)]


@in_virtual_time
async def test_nothing_of_a_killed_process_runs_any_more() -> None:
    process, done = SimulatedProcess("p"), []

    async def work() -> None:
        try:
            await asyncio.sleep(1)
            done.append("on time")
        finally:
            done.append("cleaned up")

    task = process.spawn(work())
    await asyncio.sleep(0.5)
    process.kill()
    task.cancel()
    await asyncio.sleep(5)
    assert done == []
    assert not task.done()
    assert process.unfinished() == [task]
    process.resume()
    process.call_soon(done.append, "again")
    await asyncio.sleep(1)
    assert done == []


def test_a_run_in_which_everybody_waits_for_ever_says_so() -> None:
    with pytest.raises(RuntimeError, match="nothing can ever happen"):
        run_virtual(lambda: asyncio.Event().wait())


def test_a_run_that_never_comes_to_time_says_so() -> None:
    async def circle() -> None:
        while True:
            await asyncio.sleep(0)

    loop = VirtualLoop(most_steps=1000)
    with pytest.raises(RuntimeError, match="round in a circle"):
        loop.run_until_complete(circle())
    loop.close()


@in_virtual_time
async def test_what_was_sent_to_a_paused_process_is_answered_when_it_resumes() -> None:
    pair = Pair()
    ref = await pair.start()
    pair.process.pause()
    asking = [asyncio.ensure_future(ref.ask(Count(number))) for number in (1, 2, 3)]
    await asyncio.sleep(1.0)
    assert pair.counter.heard == [0]
    pair.process.resume()
    assert [(await each).number for each in asking] == [1, 2, 3]
    await pair.near.stop()


@in_virtual_time
async def test_a_process_that_is_paused_for_long_is_given_up_by_its_peers() -> None:
    pair = Pair()
    ref = await pair.start()
    pair.process.pause()
    began = now()
    with pytest.raises(LinkLost, match="not been heard of"):
        await ref.ask(Count(1))
    assert 2.0 <= now() - began <= 3.0
    pair.process.resume()
    assert (await ref.ask(Count(2))).number == 2
    assert pair.counter.heard == [0, 1, 2]
    await pair.near.stop()


@pytest.mark.parametrize("is_one_host", [False, True])
@in_virtual_time
async def test_a_killed_process_closes_its_connections_and_its_host_proves_the_death(is_one_host: bool) -> None:
    pair = Pair(is_one_host=is_one_host)
    pair.counter.seconds = 5.0
    ref = await pair.start()
    asking = asyncio.ensure_future(ref.ask(Count(1)))
    await asyncio.sleep(1.0)
    began = now()
    pair.process.kill()
    with pytest.raises(ActorDied if is_one_host else LinkLost):
        await asking
    assert now() - began < 0.01
    with pytest.raises(LinkLost, match="nobody listens"):
        await ref.ask(Count(2))
    await pair.near.stop()


@in_virtual_time
async def test_a_broken_connection_loses_a_suffix_in_each_direction() -> None:
    pair = Pair(weather=Weather(min_s=0.1, max_s=0.2))
    ref = await pair.start()
    asking = []
    for number in range(1, 11):
        asking.append(asyncio.ensure_future(ref.ask(Count(number))))
        await asyncio.sleep(0.001)
    (connection,) = pair.hub.connections("sim://near", "sim://far")
    pair.hub.break_connection(connection, Break(keep_out=0.5, keep_in=None, near_s=1.0, far_s=None))
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert pair.counter.heard == [0, 1, 2, 3, 4, 5]
    assert [result.number for result in results[:5]] == [1, 2, 3, 4, 5]
    assert all(isinstance(result, LinkLost) for result in results[5:])
    assert pair.hub.num_lost >= 5
    await pair.near.stop()


@in_virtual_time
async def test_what_is_sent_into_a_short_partition_arrives_after_it() -> None:
    pair = Pair()
    ref = await pair.start()
    partition = pair.hub.partition(frozenset({"sim://far"}), refuses=False)
    asking = asyncio.ensure_future(ref.ask(Count(1)))
    await asyncio.sleep(1.0)
    assert pair.counter.heard == [0]
    pair.hub.heal(partition)
    assert (await asking).number == 1
    await pair.near.stop()


@pytest.mark.parametrize("refuses", [False, True])
@in_virtual_time
async def test_a_long_partition_ends_calls_and_dials_and_heals(refuses: bool) -> None:
    pair = Pair()
    ref = await pair.start()
    partition = pair.hub.partition(frozenset({"sim://far"}), refuses=refuses)
    with pytest.raises(LinkLost):
        await ref.ask(Count(1))
    with pytest.raises(LinkLost, match="no way" if refuses else "not been heard of"):
        await ref.ask(Count(2))
    pair.hub.heal(partition)
    await asyncio.sleep(3.0)
    assert (await ref.ask(Count(3))).number == 3
    assert pair.counter.heard[-1] == 3
    assert 2 not in pair.counter.heard
    await pair.near.stop()


@in_virtual_time
async def test_a_full_transport_sends_later_and_loses_nothing() -> None:
    pair = Pair()
    ref = await pair.start()
    transport: Any = pair.near.transport
    transport.is_full = True
    asking = asyncio.ensure_future(ref.ask(Count(1)))
    with pytest.raises(AskTimeout):
        await ref.ask(Count(2), timeout=0.3)
    transport.is_full = False
    assert (await asking).number == 1
    await pair.near.stop()


@in_virtual_time
async def test_what_was_sent_before_a_node_dialled_anew_does_not_come_after_it() -> None:
    pair = Pair(weather=Weather(min_s=0.1, max_s=0.2))
    ref = await pair.start()
    (connection,) = pair.hub.connections("sim://near", "sim://far")
    pair.hub.weather = Weather(min_s=1.0, max_s=1.0)
    late = asyncio.ensure_future(ref.ask(Count(1)))
    await asyncio.sleep(0.001)
    pair.hub.weather = Weather(min_s=0.1, max_s=0.1)
    # Nothing is lost, but the caller takes the connection for broken.
    pair.hub.break_connection(connection, Break(keep_out=None, keep_in=None, near_s=0.0, far_s=None))
    with pytest.raises(LinkLost):
        await late
    assert (await ref.ask(Count(2))).number == 2
    await asyncio.sleep(2.0)
    assert pair.counter.heard == [0, 2]
    await pair.near.stop()


@in_virtual_time
async def test_no_timer_runs_before_its_time() -> None:
    loop = asyncio.get_running_loop()
    just_before_s = 2.2 - 4e-16
    assert just_before_s < 2.2
    await asyncio.sleep(just_before_s)
    assert loop.time() == just_before_s
    due_s: list[float] = []
    loop.call_at(2.2, lambda: due_s.append(loop.time()))
    while not due_s:
        await asyncio.sleep(0)  # While others have something to do.
    assert due_s == [2.2], "whoever looks at the clock and waits anew goes round in a circle"
