"""Turns: how long a message waited in its process, where that was long, is a record."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from callboard.bus import Ask, Message, Node, Ref, Stream, TapRecord, Tell, VirtualClock, current_call
from callboard.bus.taps import ANSWERED, ENDED, RECEIVED, SPAN
from callboard.bus.testing import run_virtual
from callboard.bus.transports.inproc import InprocHub

BUSY_S = 0.02


class Done(Message, frozen=True):
    pass


class Work(Ask[Done], frozen=True):
    request_id: str


class Count(Stream[int], frozen=True):
    request_id: str


class Burn(Tell, frozen=True):
    """Keep the process busy."""


class Worker:
    def __init__(self, node: Node) -> None:
        self.node = node

    async def on_work(self, message: Work) -> Done:
        return Done()

    async def on_count(self, message: Count) -> AsyncIterator[int]:
        yield 1

    def on_burn(self, message: Burn) -> None:
        burn(self.node)


def burn(node: Node) -> None:
    until = node.clock.now() + BUSY_S
    while node.clock.now() < until:
        pass


@asynccontextmanager
async def nodes(clock: VirtualClock | None = None) -> AsyncIterator[tuple[Node, Node, Ref]]:
    hub = InprocHub()

    def node(name: str) -> Node:
        return Node(name, endpoint=f"inproc://{name}", transport=hub.transport(), clock=clock)

    async with node("server") as server, node("client") as client:
        yield client, server, client.ref(server.add("worker", Worker(server)).address)


def turns(node: Node) -> list[TapRecord]:
    records = [TapRecord(*row) for row in node.trace.of("r")]
    return [record for record in records if record.what == SPAN and record.name == "turn"]


def time_of(node: Node, what: int) -> float:
    [time] = [row[1] for row in node.trace.of("r") if row[0] == what]
    return float(time)


@pytest.mark.parametrize("kind", [Work, Count])
async def test_a_message_whose_handler_has_to_wait_for_its_process_says_so(kind: type[Work] | type[Count]) -> None:
    async with nodes() as (_, server, worker):
        asking = asyncio.ensure_future(worker.ask(Work("r")) if kind is Work else _read(worker))
        await asyncio.sleep(0)  # It is sent; what follows leaves in the same batch.
        worker.tell(Burn())
        await asking
        [turn] = [turn for turn in turns(server) if turn.time - turn.begin >= BUSY_S]
        assert turn.actor == "worker"
        assert turn.begin == time_of(server, RECEIVED)
        assert turn.time <= time_of(server, ANSWERED)
        [received] = [row for row in server.trace.of("r") if row[0] == RECEIVED]
        assert turn.parent == received[8]


async def _read(worker: Ref) -> None:
    async with worker.stream(Count("r")) as numbers:
        async for _ in numbers:
            pass


async def test_who_asked_and_goes_on_late_says_so() -> None:
    """The asker is an actor, whose process is busy when the answer comes."""

    class Asker:
        worker: Ref

        async def on_work(self, message: Work) -> Done:
            call = current_call()
            assert call is not None
            return await self.worker.ask(message)

    async with nodes() as (client, _, worker):
        asker = Asker()
        asker.worker = worker
        # The answer is there, and before who waits for it has its turn the process is at something else.
        client.follow(lambda row, *_: burn(client) if (row[0], row[4]) == (ENDED, "asker") else None)
        await client.ref(client.add("asker", asker).address).ask(Work("r"))
        [ended] = [TapRecord(*row) for row in client.trace.of("r") if (row[0], row[4]) == (ENDED, "asker")]
        [turn] = [turn for turn in turns(client) if turn.time - turn.begin >= BUSY_S]
        assert (turn.actor, turn.begin, turn.parent) == ("asker", ended.time, ended.parent)


def test_where_nothing_takes_time_nobody_waits_for_a_turn() -> None:
    async def main() -> int:
        async with nodes(VirtualClock()) as (client, server, worker):
            await worker.ask(Work("r"))
            return len(turns(server) + turns(client))

    assert run_virtual(main) == 0
