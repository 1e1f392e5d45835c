"""What fuzzing has found: each of these ended an actor, spun it, or cut off an honest peer."""

import asyncio
import gc
import logging
import math
import weakref
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

import msgspec
import pytest
import two_managers
from fleet import running_fleet
from fuzz.recorder import LAYOUT
from two_managers import PROMPT, in_virtual_time, prep, send

from callboard.actors.actor import Actor, start_actor, stop_actor
from callboard.actors.directory import MOST_ENTRY_BYTES, MOST_VIEW_BYTES, Directory
from callboard.actors.kv_manager.writers import MOST_KNOWN
from callboard.actors.protocol import (
    Attach,
    BadRequest,
    ComputeKv,
    Done,
    Entry,
    Generate,
    GetSubRequests,
    Give,
    KvComputed,
    LayersDone,
    ListEntries,
    Register,
    SamplingParams,
    SubRequest,
    Tie,
    Tied,
)
from callboard.bus import ActorDied, Address, Ask, LinkLost, Node, Ref, Refusal, Stream, VirtualClock
from callboard.bus.deadlines import Deadlines
from callboard.bus.frames import (
    ASK,
    PROTOCOL_VERSION,
    STREAM,
    Fail,
    Hello,
    Items,
    Post,
    Refused,
    Welcome,
    decode_batch,
    encode_batch,
)
from callboard.bus.testing import run_virtual
from callboard.bus.transports.inproc import InprocHub
from callboard.kv.layout import OutOfBlocks
from callboard.kv.tokens import pack_tokens
from callboard.router.spans import MOST_TOLD, Spans

NEVER_TIMES = [math.nan, math.inf, -math.inf, -1.0, 1e300]

# ---- the bus -----------------------------------------------------------------------------------------------------


class Nap(Ask[int], frozen=True):
    pass


class Count(Stream[int], frozen=True):
    pass


class Server:
    async def on_nap(self, message: Nap) -> int:
        await asyncio.sleep(60)
        return 1

    async def on_count(self, message: Count) -> AsyncIterator[int]:
        yield 1


class Ended:
    def expire(self) -> None:
        raise AssertionError


class Bare:
    """A connection without a node: sends frames, and keeps what comes back."""

    def __init__(self, hub: InprocHub) -> None:
        self.heard: list[Any] = []
        self._transport = hub.transport()
        self._sent = 0

    async def dial(self, endpoint: str) -> None:
        await self._transport.start("", self)
        self._connection = self._transport.dial(endpoint)

    def accepted(self, connection: Any) -> None:
        raise AssertionError

    def received(self, connection: Any, batch: bytes) -> None:
        self.heard += decode_batch(batch)[2]

    def closed(self, connection: Any, reason: str) -> None:
        pass

    async def send(self, *frames: Any, incarnation: str = "i") -> list[Any]:
        """Send a batch; return what came back for it."""
        self.heard.clear()
        self._connection.send(encode_batch((incarnation, self._sent, frames)))
        self._sent += 1
        for _ in range(10):
            await asyncio.sleep(0)
        return list(self.heard)


@pytest.fixture
async def bare() -> AsyncIterator[Bare]:
    """A bare connection to a node with a server. At the end an honest node must be answered."""
    hub = InprocHub()
    async with Node("a", endpoint="inproc://a", transport=hub.transport()) as a:
        a.add("server", Server())
        bare = Bare(hub)
        await bare.dial("inproc://a")
        yield bare
        async with Node("b", transport=hub.transport()) as b:
            async with b.ref(a.address_of("server")).stream(Count(), timeout=5) as items:
                assert [item async for item in items] == [1]


def hello(node: str = "stranger") -> Hello:
    return Hello(PROTOCOL_VERSION, "", node, "i", "")


def post(call_id: int, message: Any, kind: int, timeout: float | None = 1.0) -> Post:
    return Post(call_id, kind, "server", msgspec.Raw(msgspec.msgpack.encode(message)), timeout)


@pytest.mark.parametrize("call_id", [0, -1, -(2**63)])
async def test_a_call_without_a_proper_id_is_refused(bare: Bare, call_id: int) -> None:
    assert [type(frame) for frame in await bare.send(hello())] == [Welcome]
    (fail,) = await bare.send(post(call_id, Count(), STREAM))
    assert (type(fail), fail.id, fail.name) == (Fail, call_id, "NotUnderstood")
    assert Items in [type(frame) for frame in await bare.send(post(2**63, Count(), STREAM))]


async def test_a_first_batch_of_nothing_is_refused(bare: Bare) -> None:
    assert [type(frame) for frame in await bare.send()] == [Refused]


async def test_a_deadline_long_past_ends_its_call_and_not_the_link(bare: Bare) -> None:
    await bare.send(hello(), post(1, Nap(), ASK, -math.inf))
    async with asyncio.timeout(10):
        while Fail not in map(type, bare.heard):
            await asyncio.sleep(0.01)
    assert [(type(frame), frame.kind) for frame in bare.heard if type(frame) is Fail] == [(Fail, "timeout")]


async def test_a_name_of_any_length_is_refused_in_few_words(bare: Bare, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (refused,) = await bare.send(hello("n" * 10**6))
    assert type(refused) is Refused
    assert all(len(text) < 2000 for text in (refused.reason, *caplog.messages))


async def test_what_a_batch_claims_to_be_from_is_not_repeated_at_length(
    bare: Bare, caplog: pytest.LogCaptureFixture
) -> None:
    await bare.send(hello())
    with caplog.at_level(logging.WARNING):
        (refused,) = await bare.send(incarnation="i" * 10**6)
    assert type(refused) is Refused
    assert all(len(text) < 2000 for text in (refused.reason, *caplog.messages))


async def test_a_deadline_keeps_nothing_of_the_call_it_was_set_in() -> None:
    class Kept:
        pass

    current: ContextVar[Kept] = ContextVar("current")
    deadlines, call = Deadlines(), Ended()

    async def ask() -> weakref.ref[Kept]:
        kept = Kept()
        current.set(kept)
        slot = deadlines.add(call, 1000.0)
        assert slot is not None
        slot.pop(call)
        return weakref.ref(kept)

    kept = await asyncio.create_task(ask())
    await asyncio.sleep(0)
    gc.collect()
    assert kept() is None


# ---- KV managers -------------------------------------------------------------------------------------------------


class Liar(Actor):
    """Ties itself as often as it has pools to show, and has computed more layers than there are."""

    def __init__(self, *paths: str) -> None:
        self.paths = paths

    async def on_tie(self, message: Tie) -> AsyncIterator[Tied]:
        for path in self.paths:
            yield Tied(path)
        await asyncio.get_running_loop().create_future()

    async def on_compute_kv(self, message: ComputeKv) -> AsyncIterator[LayersDone | KvComputed]:
        yield LayersDone(-1, 99, 0, 11)
        yield KvComputed(11, 0.0, 0.0)


async def add_liar(fleet: two_managers.Fleet, *paths: str) -> Address:
    actor = fleet.actors["liar"] = Liar(*paths)
    return (await start_actor(await fleet.node("liar"), "liar", actor)).address


@in_virtual_time()
async def test_slab_blocks_that_are_no_ids_are_refused(fleet: two_managers.Fleet) -> None:
    fleet.at("d").tell(Give("engine", b"abc"))
    await fleet.settle()
    assert (await fleet.stats("d")).free == 16


@pytest.mark.parametrize("wait_s", [math.nan, -math.inf, -1.0])
def test_a_wait_that_is_no_time_is_none(wait_s: float) -> None:
    @in_virtual_time()
    async def test(fleet: two_managers.Fleet) -> None:
        await fleet.at("d").ask(prep(range(40), request_id="a"))
        with pytest.raises(OutOfBlocks):
            await fleet.at("d").ask(prep(range(100, 140), request_id="b", wait_s=wait_s))

    test()


@in_virtual_time()
async def test_an_engine_whose_name_is_taken_over_hears_of_it(fleet: two_managers.Fleet) -> None:
    message = Attach("other", two_managers.LAYOUT, Address("client", "inproc://client", "other"))
    async with fleet.at("d").stream(message) as first:
        await anext(aiter(first))
        async with fleet.at("d").stream(message) as second:
            await anext(aiter(second))
            with pytest.raises(LinkLost):
                await anext(aiter(first))


@in_virtual_time()
async def test_a_manager_that_ties_itself_twice_ends_nobody_else(fleet: two_managers.Fleet) -> None:
    path = fleet.actors["d"].pool_path
    address = await add_liar(fleet, path, path)
    reserved = await fleet.at("d").ask(prep(PROMPT))
    lie = msgspec.structs.replace(reserved, kv=msgspec.structs.replace(reserved.kv, manager=address))
    with pytest.raises((Refusal, LinkLost)):
        await fleet.at("p").ask(send(lie, PROMPT))
    assert (await fleet.at("p").ask(send(reserved, PROMPT))).num_bytes


@in_virtual_time()
async def test_a_manager_that_shows_a_pool_of_another_layout_ends_nobody_else(fleet: two_managers.Fleet) -> None:
    layout = msgspec.structs.replace(two_managers.LAYOUT, head_dim=64)
    await fleet.manager("x", layout=layout)
    address = await add_liar(fleet, fleet.actors["x"].pool_path)
    reserved = await fleet.at("d").ask(prep(PROMPT))
    epoch = fleet.actors["x"].epoch
    lie = msgspec.structs.replace(reserved, kv=msgspec.structs.replace(reserved.kv, manager=address, epoch=epoch))
    with pytest.raises((Refusal, LinkLost)):
        await fleet.at("p").ask(send(lie, PROMPT))
    assert (await fleet.at("p").ask(send(reserved, PROMPT))).num_bytes


@in_virtual_time()
async def test_an_engine_that_has_computed_layers_that_are_not_ends_nobody_else(fleet: two_managers.Fleet) -> None:
    address = await add_liar(fleet)
    reserved = await fleet.at("d").ask(prep(PROMPT))
    async with fleet.at("p").stream(Attach("liar", two_managers.LAYOUT, address)) as items:
        await anext(aiter(items))
        with pytest.raises(ActorDied, match="layers"):
            await fleet.at("p").ask(msgspec.structs.replace(send(reserved, PROMPT), engine="liar"))
    assert (await fleet.at("p").ask(send(reserved, PROMPT))).num_bytes


@in_virtual_time()
async def test_writers_and_engines_that_came_and_went_are_forgotten(fleet: two_managers.Fleet) -> None:
    actor = fleet.actors["d"]
    for i in range(2 * MOST_KNOWN):
        actor._writers._remember(f"node-{i}", f"incarnation-{i}")
        actor.blocks.detach(actor.blocks.attach(f"engine-{i}", "i"), is_known=False)
    assert len(actor._writers._incarnations) == MOST_KNOWN
    assert not actor.blocks._lost


# ---- engines, routers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [b"abc", b"\0" * 13, *map(pack_tokens, ([999], [-1], [3, 3]))])
def test_a_block_table_that_no_pool_has_is_refused(table: bytes) -> None:
    async def main() -> None:
        async with running_fleet(layout=LAYOUT, clock=VirtualClock()) as fleet:
            engine = Ref(fleet.nodes["kv-d"], fleet.actors["d"].ref.address)
            message = ComputeKv("r", pack_tokens(range(16)), table, 0, fleet.actors["d"].attachment.named)
            with pytest.raises(BadRequest, match="block"):
                async with engine.stream(message) as items:
                    await anext(aiter(items))
            assert len((await fleet.generate(list(range(40)), SamplingParams(max_tokens=3))).tokens) == 3

    run_virtual(main)


@pytest.mark.parametrize(("request_id", "prompt"), [("r", b"\1\0\0"), ("r" * 10_000, pack_tokens([1, 2]))])
def test_what_is_no_request_is_the_clients_fault_and_not_the_scripts(request_id: str, prompt: bytes) -> None:
    async def main() -> None:
        async with running_fleet(layout=LAYOUT, clock=VirtualClock()) as fleet:
            with pytest.raises(BadRequest):
                async with fleet.router.stream(Generate(request_id, "tiny", prompt, SamplingParams())) as tokens:
                    await anext(aiter(tokens))
            assert (await fleet.router.ask(GetSubRequests())).items == ()

    run_virtual(main)


def test_the_sub_requests_that_are_told_at_once_are_bounded() -> None:
    spans = Spans()
    for i in range(100):
        for _ in range(300):
            spans.add(SubRequest(f"request-{i}", "probe", "engine", 0.0, 1.0))
    told = spans.of_last(2**63)
    assert MOST_TOLD - 300 < len(told) <= MOST_TOLD
    assert told[-1].request_id == "request-99"


# ---- the directory -----------------------------------------------------------------------------------------------


async def with_directory(test: Any) -> None:
    async with Node("control", endpoint="inproc://c", transport=InprocHub().transport(), clock=VirtualClock()) as node:
        actor = Directory()
        ref = await start_actor(node, "directory", actor)
        await test(ref)
        await stop_actor(actor)


def entry(name: str, **fields: Any) -> Entry:
    return Entry(name, "engine", Address("n", "inproc://n", name), **fields)


@pytest.mark.parametrize("lease_s", NEVER_TIMES)
def test_a_lease_that_is_no_time_is_refused(lease_s: float) -> None:
    async def test(directory: Ref) -> None:
        await directory.ask(Register(entry("a"), 3.0))
        with pytest.raises(BadRequest):
            await directory.ask(Register(entry("b"), lease_s))
        assert [each.name for each in (await directory.ask(ListEntries())).entries] == ["a"]

    run_virtual(lambda: with_directory(test))


def test_a_view_stays_small_enough_to_be_sent() -> None:
    async def test(directory: Ref) -> None:
        with pytest.raises(BadRequest):
            await directory.ask(Register(entry("n" * 1000), 3.0))
        with pytest.raises(BadRequest):
            await directory.ask(Register(entry("large", detail={"x": "x" * MOST_ENTRY_BYTES}), 3.0))
        detail = {"x": "x" * (MOST_ENTRY_BYTES - 1000)}
        num_fitting = MOST_VIEW_BYTES // MOST_ENTRY_BYTES
        for i in range(num_fitting):
            assert await directory.ask(Register(entry(f"e{i}", detail=detail), 3.0)) == Done()
        for i in range(4):  # The rest of the room, at most.
            try:
                await directory.ask(Register(entry(f"f{i}", detail=detail), 3.0))
            except BadRequest:
                break
        with pytest.raises(BadRequest):
            await directory.ask(Register(entry("g", detail=detail), 3.0))
        assert len((await directory.ask(ListEntries())).entries) >= num_fitting
        await asyncio.sleep(4)  # What has lapsed takes no room.
        assert await directory.ask(Register(entry("g", detail=detail), 3.0)) == Done()

    run_virtual(lambda: with_directory(test))
