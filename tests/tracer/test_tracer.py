"""The tracer of a node: who watches gets what the node notes, in bounded memory, and leaves nothing behind."""

import asyncio
import hashlib
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from waiting import PATIENCE_S

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.protocol import BadRequest, Done, Generate, SamplingParams
from callboard.actors.trace_protocol import TRACER, Follow, GetMoment, GetRecords, Records
from callboard.actors.tracer import (
    HASH_BYTES,
    MOST_AT_ONCE,
    MOST_BODY,
    MOST_FOLLOWERS,
    MOST_WAITING,
    MOST_WAITING_BYTES,
    Tracer,
    body_writer,
    hashed,
)
from callboard.bus import Ask, Node, Ref, Stream, Tell
from callboard.bus.taps import BODY, NO_BODY, NO_FACTS, RECEIVED, SPAN
from callboard.bus.transports.inproc import InprocHub
from callboard.bus.transports.zmq import ZmqTransport
from callboard.kv.tokens import pack_tokens


class Note(Tell, frozen=True):
    request_id: str
    number: int


class Sync(Ask[Done], frozen=True):
    pass


class Run(Stream[int], frozen=True):
    request_id: str
    prompt: bytes
    headers: dict[str, str] = {}


class Worker:
    def on_note(self, message: Note) -> None:
        return

    def on_sync(self, message: Sync) -> Done:
        return Done()

    async def on_run(self, message: Run) -> AsyncIterator[int]:
        yield 1


class World:
    """A node with a tracer and a worker, one that sends to it, and one that watches."""

    def __init__(self, server: Node, client: Node, watcher: Node, tracer: Tracer) -> None:
        self.server, self.client, self.watcher, self.tracer = server, client, watcher, tracer
        self.worker = client.ref(server.add("worker", Worker()).address)
        self.traced: Ref = watcher.ref(server.address_of(TRACER))

    async def note(self, request_id: str, count: int = 1) -> None:
        for number in range(count):
            self.worker.tell(Note(request_id, number))
            if number % 1000 == 999:
                await self.worker.ask(Sync())
        await self.worker.ask(Sync())


@asynccontextmanager
async def world(config: Tracer.Config | None = None, *, is_zmq: bool = False) -> AsyncIterator[World]:
    hub = InprocHub()

    def node(name: str) -> Node:
        transport = ZmqTransport() if is_zmq else hub.transport()
        return Node(name, endpoint="tcp://127.0.0.1:*" if is_zmq else f"inproc://{name}", transport=transport)

    async with node("server") as server, node("client") as client, node("watcher") as watcher:
        tracer = Tracer(config)
        await start_actor(server, TRACER, tracer)
        try:
            yield World(server, client, watcher, tracer)
        finally:
            await stop_actor(tracer)


async def until(condition) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def test_who_comes_late_gets_the_past_first_and_then_what_happens() -> None:
    async with world() as w:
        await w.note("before")
        async with w.traced.stream(Follow(every_s=0.01)) as items:
            past = await anext(items)
            assert past.is_past
            assert [r.request_id for r in past.records] == ["before"]
            await w.note("after")
            live = await anext(items)
            assert not live.is_past
            assert [(r.what, r.request_id) for r in live.records] == [(RECEIVED, "after")]
            assert live.num_records == 2


async def test_without_the_past_the_first_message_is_empty() -> None:
    async with world() as w:
        await w.note("before")
        async with w.traced.stream(Follow(with_past=False)) as items:
            first = await anext(items)
            assert (first.records, first.num_records) == ((), 0)


@pytest.mark.parametrize("is_zmq", [False, True])
async def test_detaching_leaves_nothing_behind(is_zmq: bool) -> None:
    async with world(is_zmq=is_zmq) as w:
        for everything in (False, True):
            async with w.traced.stream(Follow(everything=everything, bodies="hashed")) as items:
                await anext(items)
                assert w.tracer.num_followers == 1
                assert (w.server.tap is not None) is everything
            await until(lambda: not w.tracer.num_followers)
            assert w.server.tap is None
            assert w.server.trace.followers == ()


async def test_one_that_does_not_read_loses_records_and_is_told_how_many() -> None:
    async with world() as w:
        count = MOST_WAITING + 5000
        async with w.traced.stream(Follow(with_past=False, every_s=0.01), credit=1) as items:
            await anext(items)
            await w.note("r", count)
            got, lost, told = 0, 0, 0
            async with asyncio.timeout(PATIENCE_S):
                while got + lost < count:
                    batch: Records = await anext(items)
                    got, lost, told = got + len(batch.records), lost + batch.num_lost, batch.num_records
                    assert len(batch.records) <= MOST_AT_ONCE
            assert got + lost == count == told
            assert lost > 0
            await w.note("again")
            batch = await anext(items)
            assert (batch.num_lost, [r.request_id for r in batch.records]) == (0, ["again"])


async def test_what_was_lost_is_told_in_its_place() -> None:
    async with world() as w, w.traced.stream(Follow(with_past=False), credit=1) as items:
        await anext(items)
        follower = w.tracer._followers[0]
        row = (RECEIVED, 0.0, 0.0, "", "", "", "x", "r", 1, 0, 0, 0, 0.0, "", NO_FACTS, NO_BODY)
        for _ in range(MOST_WAITING + 7):
            follower.take(row, None)
        before = [follower.take_out() for _ in range(3)]
        for _ in range(2 * MOST_AT_ONCE):  # There is room again, and these come after those that were lost.
            follower.take(row, None)
        batches = [*before, *(follower.take_out() for _ in range(MOST_WAITING // MOST_AT_ONCE - 1))]
        assert [lost for _, lost in batches] == [0] * (len(batches) - 2) + [7, 0]
        assert all(len(got) == MOST_AT_ONCE for got, _ in batches)
        assert not follower.rows


async def test_bodies_as_long_as_messages_fill_neither_memory_nor_a_message() -> None:
    num_bytes, count = 3 << 20, 40
    async with world(Tracer.Config(prompts="full"), is_zmq=True) as w:
        async with w.traced.stream(Follow(bodies="full", with_past=False, every_s=0.01), credit=4) as items:
            await anext(items)
            for number in range(count):
                async with w.worker.stream(Run(f"r{number}", bytes(num_bytes))) as numbers:
                    assert [n async for n in numbers] == [1]
                held = sum(len(row[BODY]) for row in w.tracer._followers[0].rows if isinstance(row, tuple))
                assert held < MOST_WAITING_BYTES + 2 * num_bytes
            received, lost = 0, 0
            async with asyncio.timeout(PATIENCE_S):
                while not lost:
                    batch = await anext(items)
                    lost += batch.num_lost
                    received += sum(len(r.body) > num_bytes for r in batch.records)
                assert received > MOST_WAITING_BYTES // num_bytes
                await w.note("last")
                while "last" not in [r.request_id for r in batch.records]:
                    batch = await anext(items)


def test_a_body_that_is_too_long_for_a_message_about_it_is_left_out() -> None:
    write = body_writer(Follow(bodies="full"))
    assert len(write(Run("r", bytes(MOST_BODY // 2)))) > MOST_BODY // 2
    assert write(Run("r", bytes(MOST_BODY))) == NO_BODY


async def test_the_past_of_a_node_is_told_between_other_things() -> None:
    is_over, num_passes = False, 0

    async def live() -> None:
        nonlocal num_passes
        while not is_over:
            await asyncio.sleep(0)
            num_passes += 1

    async with world() as w, asyncio.TaskGroup() as group:
        group.create_task(live())
        for number in range(500):
            for _ in range(60):
                w.server.trace.add(
                    (SPAN, 0.0, 0.0, "", "", "", "x", f"r{number}", 1, 0, 0, 0, 0.0, "", NO_FACTS, NO_BODY)
                )
        for message in (Follow(), GetRecords()):
            num_records, num_batches, begin = 0, 0, num_passes
            async with w.traced.stream(message) as items:
                async for batch in items:
                    num_records, num_batches = num_records + len(batch.records), num_batches + 1
                    if num_records == 30_000:
                        break
            assert num_batches == 150
            assert num_passes - begin >= num_batches
        is_over = True


async def test_who_has_heard_the_past_does_not_keep_it() -> None:
    class Kept(Tell, frozen=True, weakref=True):
        pass

    async with world(Tracer.Config(keep=1)) as w:
        message = Kept()
        w.server.trace.add((SPAN, 0.0, 0.0, "", "", "", "x", "r", 1, 0, 0, 0, 0.0, "", message, NO_BODY))
        kept = weakref.ref(message)
        del message
        async with w.traced.stream(Follow(every_s=0.01)) as items:
            assert [record.request_id for record in (await anext(items)).records] == ["r"]
            assert kept() is not None
            await w.note("another")
            await anext(items)
            assert kept() is None


async def test_records_of_one_request_are_those_of_its_sequences_too() -> None:
    async with world() as w:
        for request_id in ("r", "r.1", "r.12", "r.x", "rr", "q"):
            await w.note(request_id)

        async def got(request_id: str) -> list[str]:
            async with w.traced.stream(GetRecords(request_id)) as items:
                return [r.request_id async for batch in items for r in batch.records]

        assert await got("r") == ["r", "r.1", "r.12"]
        assert await got("r.1") == ["r.1"]
        assert await got("unknown") == []
        assert len(await got("")) == 6


async def test_only_so_many_requests_are_remembered() -> None:
    async with world(Tracer.Config(keep=2)) as w:
        for request_id in ("a", "b", "c"):
            await w.note(request_id)
        assert w.server.trace.request_ids() == ["b", "c"]


async def test_too_many_watchers_are_refused() -> None:
    async with world() as w:
        async with asyncio.TaskGroup() as group:
            done = asyncio.Event()

            async def watch() -> None:
                async with w.traced.stream(Follow()) as items:
                    await anext(items)
                    await done.wait()

            for _ in range(MOST_FOLLOWERS):
                group.create_task(watch())
            await until(lambda: w.tracer.num_followers == MOST_FOLLOWERS)
            with pytest.raises(BadRequest, match="follow this node already"):
                async with w.traced.stream(Follow()) as items:
                    await anext(items)
            done.set()


async def test_a_moment_is_what_time_it_is_there() -> None:
    async with world() as w:
        before = w.server.clock.now()
        moment = await w.traced.ask(GetMoment())
        assert before <= moment.now <= w.server.clock.now()
        assert moment.incarnation == w.server.incarnation
        assert moment.host


# ---- bodies ------------------------------------------------------------------------------------------------------


async def body_at(config: Tracer.Config, message: Follow) -> dict[str, object] | None:
    async with world(config) as w, w.traced.stream(message) as items:
        await anext(items)
        prompt = pack_tokens(list(range(40)))
        async with w.worker.stream(Run("r", prompt, {"x-secret": "s"})) as numbers:
            assert [n async for n in numbers] == [1]
        received = next(r for r in (await anext(items)).records if r.what == RECEIVED)
        return msgspec.msgpack.decode(received.body)


async def test_bodies_hold_hashes_of_prompts_and_no_headers() -> None:
    body = await body_at(Tracer.Config(), Follow(bodies="hashed", salt=b"salt", every_s=0.05))
    assert body is not None
    assert "headers" not in body
    prompt = body["prompt"]
    assert isinstance(prompt, dict)
    assert (prompt["num_tokens"], prompt["block_size"], len(prompt["hashes"])) == (40, 16, 3 * HASH_BYTES)
    first = hashlib.blake2b(pack_tokens(list(range(16))), digest_size=HASH_BYTES, key=b"salt").digest()
    assert prompt["hashes"].startswith(first)


async def test_full_bodies_need_a_fleet_that_gives_them_out() -> None:
    body = await body_at(Tracer.Config(prompts="full"), Follow(bodies="full", every_s=0.05))
    assert body is not None
    assert body["prompt"] == pack_tokens(list(range(40)))
    assert body["headers"] == {"x-secret": "s"}
    with pytest.raises(BadRequest, match="hashes only"):
        await body_at(Tracer.Config(), Follow(bodies="full"))


async def test_nobody_elses_wish_for_full_bodies_shows_prompts_to_one_who_wants_none() -> None:
    async with world(Tracer.Config(prompts="full")) as w:
        async with w.traced.stream(Follow(every_s=0.01)) as plain, w.traced.stream(Follow(bodies="full")) as full:
            await anext(plain)
            await anext(full)
            async with w.worker.stream(Run("r", bytes(64))) as numbers:
                assert [n async for n in numbers] == [1]
            [mine] = [r for r in (await anext(plain)).records if r.what == RECEIVED]
            [theirs] = [r for r in (await anext(full)).records if r.what == RECEIVED]
        assert mine.body == NO_BODY
        assert theirs.body != NO_BODY


def test_the_salt_of_one_who_follows_is_told_to_no_other() -> None:
    written = body_writer(Follow(bodies="hashed", salt=b"mine"))(Follow(bodies="hashed", salt=b"theirs"))
    assert b"theirs" not in bytes(written)


def test_equal_blocks_have_equal_hashes_and_another_salt_gives_others() -> None:
    block = list(range(16))
    tokens = pack_tokens([*block, *block, 1, 2])
    hashes = hashed(tokens, b"s")["hashes"]
    assert hashes[:8] == hashes[8:16] != hashes[16:]
    assert hashed(tokens, b"other")["hashes"][:8] != hashes[:8]


def test_a_message_that_makes_no_body_is_recorded_without() -> None:
    class Odd(Tell, frozen=True):
        request_id: str
        number: int

    write = body_writer(Follow(bodies="hashed"))
    assert msgspec.msgpack.decode(write(Generate("r", "m", b"", SamplingParams(), headers={"a": "b"})))["model"] == "m"
    assert write(Odd("r", 1 << 70)) == NO_BODY
