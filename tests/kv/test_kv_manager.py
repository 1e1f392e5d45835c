import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from callboard.actors.actor import Actor, start_actor, stop_actor
from callboard.actors.kv_manager import KvManager
from callboard.actors.protocol import (
    Abort,
    Admit,
    Attach,
    Attached,
    BadRequest,
    CloseWrite,
    ComputeKv,
    Done,
    Finish,
    GetKvStats,
    Give,
    KvComputed,
    LayersDone,
    OpenWrite,
    PrepRecv,
    Probe,
    Recall,
    Refill,
    Release,
    RemoteSend,
    Seal,
    Tie,
)
from callboard.bus import FOREVER, ActorDied, Node, UnknownActor, VirtualClock
from callboard.bus.testing import run_virtual
from callboard.bus.transports.inproc import InprocHub
from callboard.kv.lanes import open_pool
from callboard.kv.layout import BadRange, KvLayout, OutOfBlocks, SlotRun, StaleReservation
from callboard.kv.tokens import pack_tokens, unpack_tokens

LAYOUT = KvLayout(num_layers=3, num_kv_heads=1, head_dim=2, block_size=4)


def kv_bytes(layer, half, position, token):
    """Return what the test engine computes for a token: a function of where and what it is."""
    return bytes([layer, half, position % 256, token % 256]) * 2


class Engine(Actor):
    """An engine of real bytes and no model."""

    def __init__(self, manager, chunk=3):
        self.manager = manager
        self.chunk = chunk
        self.slab = []
        self.store = None
        self.num_computed = 0
        self.may_compute = asyncio.Event()
        self.may_compute.set()
        self.may_finish_abort = asyncio.Event()
        self.may_finish_abort.set()
        self.aborted = []
        self.attached = asyncio.Event()
        self.tie = None

    async def start(self):
        self.tie = self.spawn(self.attach())
        await self.attached.wait()

    async def attach(self):
        async with self.manager.stream(Attach("engine", LAYOUT, self.ref.address), timeout=FOREVER) as items:
            async for item in items:
                if isinstance(item, Attached):
                    self.store = await open_pool(item.pool_path, self.node.exchange)
                    self.attached.set()
                elif isinstance(item, Recall):
                    given, self.slab = self.slab[: item.num_blocks], self.slab[item.num_blocks :]
                    self.manager.tell(Give("engine", pack_tokens(given)))

    def compute(self, tokens, table, begin, end, layer):
        for position in range(begin, end):
            slot = table[position // 4] * 4 + position % 4
            for half in (0, 1):
                self.store.slot(layer, half, slot)[:] = kv_bytes(layer, half, position, tokens[position])

    async def on_compute_kv(self, message: ComputeKv) -> AsyncIterator[LayersDone | KvComputed]:
        tokens, table = unpack_tokens(message.tokens), unpack_tokens(message.block_table)
        for begin in range(message.num_cached_tokens, len(tokens), self.chunk):
            end = min(begin + self.chunk, len(tokens))
            await self.may_compute.wait()
            self.num_computed += end - begin
            for layer in range(3):
                self.compute(tokens, table, begin, end, layer)
                yield LayersDone(layer, layer + 1, begin, end)
        yield KvComputed(len(tokens) - message.num_cached_tokens, 0.0, 0.0)

    async def on_abort(self, message: Abort) -> Done:
        self.aborted.append(message.request_id)
        await self.may_finish_abort.wait()
        return Done()


class Fleet:
    """Two KV managers on two nodes, an engine at each on nodes of their own, and a client."""

    def __init__(self, clock):
        self.hub = InprocHub()
        self.clock = clock
        self.nodes = {}
        self.actors = {}

    async def node(self, name):
        node = Node(name, endpoint=f"inproc://{name}", transport=self.hub.transport(), seed=1, clock=self.clock)
        self.nodes[name] = node
        await node.__aenter__()
        return node

    async def manager(self, name, **config):
        settings = {"name": name, "layout": LAYOUT, "num_blocks": 16, **config}
        self.actors[name] = KvManager(KvManager.Config(**settings))
        return await start_actor(await self.node(name), name, self.actors[name])

    async def engine(self, node, manager):
        self.actors[node] = engine = Engine(None)
        own = await self.node(node)
        engine.manager = own.ref(manager.address)
        await start_actor(own, "engine", engine)
        return engine

    def at(self, name):
        """Return the ref of a manager, as the client sees it."""
        return self.nodes["client"].ref(self.nodes[name].address_of(name))

    async def stats(self, name, *, recall=False):
        stats = await self.at(name).ask(GetKvStats(recall))
        assert stats.problems == ()
        return stats

    async def settle(self):
        for _ in range(60):
            await asyncio.sleep(0)


@asynccontextmanager
async def running(p_config=(), d_config=(), clock=None):
    fleet = Fleet(clock)
    await fleet.node("client")
    p, d = await fleet.manager("p", **dict(p_config)), await fleet.manager("d", **dict(d_config))
    await fleet.engine("pe", p)
    await fleet.engine("de", d)
    try:
        yield fleet
    finally:
        for actor in reversed(fleet.actors.values()):
            await stop_actor(actor)
        for node in reversed(fleet.nodes.values()):
            await node.stop()


def in_virtual_time(**configs):
    """Run a test on a fleet whose clock jumps to whatever happens next."""

    def decorate(test):
        async def main():
            async with running(clock=VirtualClock(), **configs) as fleet:
                await test(fleet)

        def run():
            run_virtual(main)

        run.__name__ = test.__name__
        return run

    return decorate


@pytest.fixture
async def fleet():
    async with running() as fleet:
        yield fleet


PROMPT = [7, 3, 9, 4, 1, 8, 2, 6, 5, 7, 7]


def prep(ids, end=None, *, request_id="r", attempt=0, wait_s=0.0):
    return PrepRecv(request_id, attempt, pack_tokens(ids), end, wait_s)


def send(reserved, ids, begin=None, end=None, *, request_id="r", wait_s=0.0):
    begin = reserved.begin if begin is None else begin
    return RemoteSend(
        request_id, 0, pack_tokens(ids), reserved.kv, begin, reserved.end if end is None else end, "engine", wait_s
    )


def admit(ids, kv=None, *, sequence_id="s", wait_s=0.0):
    return Admit("engine", sequence_id, pack_tokens(ids), kv, wait_s)


def finish(ids, table, *, sequence_id="s"):
    return Finish("engine", sequence_id, pack_tokens(ids), table)


def is_in_place(fleet, manager, ids, table, begin, end):
    """Return whether a pool holds the KV of these tokens."""
    store = fleet.actors[manager].store
    return all(
        store.slot(layer, half, table[i // 4] * 4 + i % 4) == kv_bytes(layer, half, i, ids[i])
        for layer in range(3)
        for half in (0, 1)
        for i in range(begin, end)
    )


async def test_kv_computed_at_one_manager_is_adopted_at_another(fleet):
    reserved = await fleet.at("d").ask(prep(PROMPT, 10))
    assert (reserved.begin, reserved.end, reserved.num_cached_tokens) == (0, 10, 0)
    sent = await fleet.at("p").ask(send(reserved, PROMPT))
    assert sent.num_bytes == 10 * LAYOUT.token_bytes
    assert (sent.lane, sent.num_computed_tokens, sent.num_reused_tokens) == ("inproc", 10, 0)
    admitted = await fleet.at("d").ask(admit(PROMPT, reserved.kv))
    table = unpack_tokens(admitted.block_table)
    assert admitted.num_cached_tokens == 10
    assert len(table) == 3
    assert is_in_place(fleet, "d", PROMPT, table, 0, 10)
    assert (await fleet.at("d").ask(admit(PROMPT, reserved.kv))) == admitted
    fleet.at("d").tell(finish(PROMPT, admitted.block_table))
    stats = await fleet.stats("d")
    assert (stats.free, stats.cached, stats.num_reservations) == (14, 2, 0)
    stats = await fleet.stats("p")
    assert (stats.free, stats.cached) == (14, 2)


@pytest.mark.parametrize("split", range(1, 11))
async def test_the_pages_arrive_whole_at_any_split_also_inside_a_block(fleet, split):
    await fleet.at("p").ask(send(await fleet.at("d").ask(prep(PROMPT, 5, request_id="w")), PROMPT, request_id="w"))
    reserved = await fleet.at("d").ask(prep(PROMPT, split))
    await fleet.at("p").ask(send(reserved, PROMPT))
    admitted = await fleet.at("d").ask(admit(PROMPT, reserved.kv))
    table = unpack_tokens(admitted.block_table)
    assert is_in_place(fleet, "d", PROMPT, table, 0, admitted.num_cached_tokens)
    assert admitted.num_cached_tokens == max(split, 4)


async def test_two_senders_fill_two_ranges_that_meet_inside_a_block(fleet):
    reserved = await fleet.at("d").ask(prep(PROMPT))
    first = await fleet.at("p").ask(send(reserved, PROMPT, 6, 11))
    assert first.num_computed_tokens == 11
    waiting = asyncio.ensure_future(fleet.at("d").ask(admit(PROMPT, reserved.kv)))
    await fleet.settle()
    assert not waiting.done()
    second = await fleet.at("d").ask(send(reserved, PROMPT, 0, 6))
    assert second.num_bytes == 6 * LAYOUT.token_bytes
    table = unpack_tokens((await waiting).block_table)
    assert is_in_place(fleet, "d", PROMPT, table, 0, 11)


async def test_what_is_cached_is_sent_without_waking_the_engine(fleet):
    engine = fleet.actors["pe"]
    await fleet.at("p").ask(send(await fleet.at("d").ask(prep(PROMPT, 8, request_id="a")), PROMPT, request_id="a"))
    before = engine.num_computed
    await fleet.at("d").ask(Release((await fleet.at("d").ask(prep(PROMPT, 8, request_id="a"))).kv))
    other = [*PROMPT[:8], 99]
    fleet.actors["d"].blocks.cache.evict(2)
    reserved = await fleet.at("d").ask(prep(other, 7, request_id="b"))
    sent = await fleet.at("p").ask(send(reserved, other, request_id="b"))
    assert engine.num_computed == before
    assert (sent.num_computed_tokens, sent.num_reused_tokens, sent.num_bytes) == (0, 7, 7 * LAYOUT.token_bytes)
    table = unpack_tokens((await fleet.at("d").ask(admit(other, reserved.kv))).block_table)
    assert is_in_place(fleet, "d", other, table, 0, 7)


async def test_a_cached_prefix_is_sent_and_the_rest_computed(fleet):
    await fleet.at("p").ask(send(await fleet.at("d").ask(prep(PROMPT[:4], request_id="a")), PROMPT[:4]))
    fleet.actors["d"].blocks.reservations.expire(float("inf"))
    fleet.actors["d"].blocks.cache.evict(1)
    reserved = await fleet.at("d").ask(prep(PROMPT, request_id="b"))
    sent = await fleet.at("p").ask(send(reserved, PROMPT))
    assert (sent.num_computed_tokens, sent.num_reused_tokens) == (7, 4)
    table = unpack_tokens((await fleet.at("d").ask(admit(PROMPT, reserved.kv))).block_table)
    assert is_in_place(fleet, "d", PROMPT, table, 0, 11)


async def test_a_hit_past_the_end_leaves_nothing_to_send(fleet):
    await fleet.at("p").ask(send(await fleet.at("d").ask(prep(PROMPT, request_id="a")), PROMPT))
    reserved = await fleet.at("d").ask(prep(PROMPT, 5, request_id="b"))
    assert (reserved.begin, reserved.end, reserved.kv.slots) == (8, 5, ())
    sent = await fleet.at("p").ask(send(reserved, PROMPT))
    assert sent.num_bytes == 0
    assert (await fleet.at("d").ask(admit(PROMPT, reserved.kv))).num_cached_tokens == 8


async def test_one_manager_may_be_on_both_sides(fleet):
    reserved = await fleet.at("d").ask(prep(PROMPT, 9))
    sent = await fleet.at("d").ask(send(reserved, PROMPT))
    assert (sent.lane, sent.num_bytes) == ("inproc", 9 * LAYOUT.token_bytes)
    table = unpack_tokens((await fleet.at("d").ask(admit(PROMPT, reserved.kv))).block_table)
    assert is_in_place(fleet, "d", PROMPT, table, 0, 9)


@pytest.mark.parametrize(("begin", "end"), [(0, 12), (-12, None), (0, 99)])
async def test_a_range_the_prompt_does_not_have_is_refused(fleet, begin, end):
    reserved = await fleet.at("d").ask(prep(PROMPT))
    with pytest.raises(BadRange):
        await fleet.at("p").ask(send(reserved, PROMPT, begin, end))
    with pytest.raises(BadRange):
        await fleet.at("d").ask(prep(PROMPT, 12, request_id="x"))
    with pytest.raises(BadRange):
        await fleet.at("d").ask(PrepRecv("y", 0, b"abc"))


async def test_a_range_outside_the_reservation_is_refused(fleet):
    reserved = await fleet.at("d").ask(prep(PROMPT, 5))
    with pytest.raises(BadRange):
        await fleet.at("p").ask(send(reserved, PROMPT, 0, 6))


async def test_a_released_or_foreign_reservation_is_refused(fleet):
    reserved = await fleet.at("d").ask(prep(PROMPT))
    for _ in range(2):
        await fleet.at("d").ask(Release(reserved.kv))
    with pytest.raises(StaleReservation):
        await fleet.at("p").ask(send(reserved, PROMPT))
    with pytest.raises(StaleReservation):
        await fleet.at("d").ask(admit(PROMPT, reserved.kv))
    other = await fleet.at("p").ask(prep(PROMPT))
    with pytest.raises(StaleReservation):
        await fleet.at("d").ask(admit(PROMPT, other.kv))
    assert (await fleet.stats("p")).num_reservations == 1
    assert (await fleet.stats("d")).free == 16


async def test_slots_outside_of_the_pool_are_never_written():
    async with running(d_config={"num_blocks": 4}) as fleet:
        reserved = await fleet.at("d").ask(prep(PROMPT))
        forged = type(reserved.kv)(
            reserved.kv.manager,
            reserved.kv.epoch,
            reserved.kv.reservation_id,
            LAYOUT,
            0,
            11,
            (SlotRun(40, 11),),
        )
        message = RemoteSend("r", 0, pack_tokens(PROMPT), forged, 0, 11, "engine")
        with pytest.raises(StaleReservation, match="outside"):
            await fleet.at("p").ask(message)


async def test_an_engine_of_another_layout_is_refused(fleet):
    layout = KvLayout(num_layers=4, num_kv_heads=1, head_dim=2, block_size=4)
    async with fleet.at("d").stream(Attach("x", layout, fleet.at("d").address)) as items:
        with pytest.raises(BadRequest):
            await anext(items)


async def test_an_engine_that_is_not_attached_is_unknown(fleet):
    reserved = await fleet.at("d").ask(prep(PROMPT))
    message = RemoteSend("r", 0, pack_tokens(PROMPT), reserved.kv, 0, 11, "nobody")
    with pytest.raises(UnknownActor):
        await fleet.at("p").ask(message)
    with pytest.raises(UnknownActor):
        await fleet.at("d").ask(Admit("nobody", "s", b""))


async def test_a_sequence_that_can_never_fit_is_refused_at_once(fleet):
    for message in (prep(range(65), wait_s=9.0), admit(range(65), wait_s=9.0)):
        with pytest.raises(OutOfBlocks) as refusal:
            await asyncio.wait_for(fleet.at("d").ask(message), 1.0)
        assert refusal.value.needed == 17


async def test_waiting_for_blocks_ends_when_some_come_back(fleet):
    table = (await fleet.at("d").ask(admit(range(60)))).block_table
    waiting = asyncio.ensure_future(fleet.at("d").ask(prep(PROMPT, wait_s=5.0)))
    await fleet.settle()
    assert not waiting.done()
    fleet.at("d").tell(Finish("engine", "s", b"", table))
    assert (await waiting).end == 11


async def test_waiting_for_blocks_is_bounded(fleet):
    await fleet.at("d").ask(admit(range(60)))
    with pytest.raises(OutOfBlocks) as refusal:
        await fleet.at("d").ask(prep(PROMPT, wait_s=0.01))
    assert (refusal.value.needed, refusal.value.free) == (3, 1)


async def test_admissions_go_before_prep_recv_and_refills_before_both(fleet):
    d, order = fleet.at("d"), []
    table = (await d.ask(admit(range(64)))).block_table

    async def note(name, message):
        await d.ask(message)
        order.append(name)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(note("prep", prep([1] * 8, wait_s=5.0)))
        await fleet.settle()
        tasks.create_task(note("admit", admit([2] * 8, sequence_id="t", wait_s=5.0)))
        await fleet.settle()
        tasks.create_task(note("refill", Refill("engine", 2, wait_s=5.0)))
        await fleet.settle()
        assert order == []
        d.tell(Finish("engine", "s", b"", table))
    assert order == ["refill", "admit", "prep"]


async def test_unused_slab_blocks_are_recalled_before_a_shortage_is_told(fleet):
    engine = fleet.actors["de"]
    engine.slab = unpack_tokens((await fleet.at("d").ask(Refill("engine", 16))).blocks)
    assert len(engine.slab) == 16
    assert (await fleet.at("d").ask(Refill("engine", 1))).blocks == b""
    await fleet.at("d").ask(prep(PROMPT))
    assert len(engine.slab) == 13
    stats = await fleet.stats("d", recall=True)
    assert (stats.free, stats.reserved, stats.leased) == (13, 3, 0)


async def test_callers_who_leave_while_they_wait_leak_nothing(fleet):
    d = fleet.at("d")
    table = (await d.ask(admit(range(64)))).block_table
    waiting = [
        asyncio.ensure_future(d.ask(message))
        for message in (
            prep(PROMPT, wait_s=5.0),
            admit(PROMPT, sequence_id="t", wait_s=5.0),
            Refill("engine", 4, wait_s=5.0),
        )
    ]
    await fleet.settle()
    d.tell(Finish("engine", "s", b"", table))
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    # What was granted in the very moment of leaving is given back by the usual ways.
    d.tell(Finish("engine", "t", b"", b""))
    fleet.actors["d"].blocks.reservations.expire(float("inf"))
    stats = await fleet.stats("d")
    slab = fleet.actors["d"].blocks.slabs()["engine"]
    assert stats.free == 16 - slab
    assert stats.leased == slab


async def test_a_prep_recv_repeated_gets_the_same_reservation(fleet):
    first, again = await fleet.at("d").ask(prep(PROMPT)), await fleet.at("d").ask(prep(PROMPT))
    assert first == again
    assert (await fleet.at("d").ask(prep(PROMPT, attempt=1))).kv.reservation_id != first.kv.reservation_id


@in_virtual_time()
async def test_leases_end_by_themselves(fleet):
    reserved = await fleet.at("d").ask(prep(PROMPT))
    await fleet.clock.sleep(9.9)
    assert (await fleet.stats("d")).reserved == 3
    await fleet.clock.sleep(0.2)
    assert (await fleet.stats("d")).free == 16
    with pytest.raises(StaleReservation):
        await fleet.at("d").ask(admit(PROMPT, reserved.kv))


@in_virtual_time()
async def test_a_slow_send_outlasts_the_lease_while_its_writer_lives(fleet):
    reserved = await fleet.at("d").ask(prep(PROMPT))
    fleet.actors["pe"].may_compute.clear()
    sending = asyncio.ensure_future(fleet.at("p").ask(send(reserved, PROMPT), timeout=100))
    await fleet.clock.sleep(50)
    fleet.actors["pe"].may_compute.set()
    await sending
    assert (await fleet.at("d").ask(admit(PROMPT, reserved.kv))).num_cached_tokens == 11


@in_virtual_time()
async def test_a_reservation_waits_for_its_pages_as_long_as_somebody_waits_for_it(fleet):
    reserved = await fleet.at("d").ask(prep(PROMPT))
    admitting = asyncio.ensure_future(fleet.at("d").ask(admit(PROMPT, reserved.kv), timeout=100))
    await fleet.clock.sleep(50)
    await fleet.at("p").ask(send(reserved, PROMPT))
    assert (await admitting).num_cached_tokens == 11


@in_virtual_time()
async def test_an_expired_write_of_an_unknown_writer_is_quarantined(fleet):
    kv = (await fleet.at("d").ask(prep(PROMPT))).kv
    await fleet.at("d").ask(OpenWrite(kv.reservation_id, kv.epoch, "w", 0, 11))
    await fleet.clock.sleep(11)
    assert (await fleet.stats("d")).quarantined == 3
    await fleet.clock.sleep(1000)
    assert (await fleet.stats("d")).quarantined == 3
    with pytest.raises(StaleReservation):
        await fleet.at("d").ask(CloseWrite(kv.reservation_id, kv.epoch, "w", True))
    assert (await fleet.stats("d")).free == 16
    await fleet.at("d").ask(CloseWrite(kv.reservation_id, kv.epoch, "w", True))


async def test_a_writer_that_leaves_its_tie_has_stopped_writing(fleet):
    reserved = await fleet.at("d").ask(prep(PROMPT))
    kv = reserved.kv
    async with fleet.at("d").stream(Tie(kv.epoch), timeout=FOREVER) as items:
        await anext(items)
        await fleet.at("d").ask(OpenWrite(kv.reservation_id, kv.epoch, "w", 0, 11))
        await fleet.at("d").ask(Release(kv))
        assert (await fleet.stats("d")).quarantined == 3
    await fleet.settle()
    assert (await fleet.stats("d")).free == 16


async def test_a_cancelled_send_closes_its_write_and_waits_for_the_engine(fleet):
    engine = fleet.actors["pe"]
    reserved = await fleet.at("d").ask(prep(PROMPT))
    engine.may_compute.clear()
    engine.may_finish_abort.clear()
    sending = asyncio.ensure_future(fleet.at("p").ask(send(reserved, PROMPT)))
    await fleet.settle()
    assert (await fleet.stats("p")).leased == 3
    sending.cancel()
    await fleet.settle()
    assert (await fleet.stats("p")).leased == 3, "the engine may still be writing"
    assert len(engine.aborted) == 1
    engine.may_finish_abort.set()
    await fleet.settle()
    assert (await fleet.stats("p")).free == 16
    await fleet.at("d").ask(Release(reserved.kv))
    assert (await fleet.stats("d")).free == 16


async def test_a_failed_send_may_be_tried_again(fleet):
    reserved = await fleet.at("d").ask(prep(PROMPT))
    fleet.actors["pe"].may_compute.clear()
    with pytest.raises(TimeoutError):
        await fleet.at("p").ask(send(reserved, PROMPT), timeout=0.05)
    fleet.actors["pe"].may_compute.set()
    await fleet.settle()
    await fleet.at("p").ask(send(reserved, PROMPT))
    table = unpack_tokens((await fleet.at("d").ask(admit(PROMPT, reserved.kv))).block_table)
    assert is_in_place(fleet, "d", PROMPT, table, 0, 11)


async def test_an_engine_that_dies_while_it_computes_fails_the_send(fleet):
    reserved = await fleet.at("d").ask(prep(PROMPT))
    fleet.actors["pe"].may_compute.clear()
    sending = asyncio.ensure_future(fleet.at("p").ask(send(reserved, PROMPT)))
    await fleet.settle()
    await stop_actor(fleet.actors.pop("pe"))
    with pytest.raises(ActorDied):
        await sending
    await fleet.settle()
    assert (await fleet.stats("p")).free == 16
    await fleet.at("d").ask(Release(reserved.kv))
    assert (await fleet.stats("d")).free == 16


async def test_an_engine_that_leaves_gives_back_what_it_held(fleet):
    admitted = await fleet.at("d").ask(admit(PROMPT))
    await fleet.at("d").ask(Refill("engine", 4))
    fleet.at("d").tell(Seal("engine", "s", pack_tokens(PROMPT), admitted.block_table))
    assert (await fleet.stats("d")).leased == 7
    fleet.actors["de"].tie.cancel()
    await fleet.settle()
    stats = await fleet.stats("d")
    assert (stats.free, stats.cached, stats.leased) == (14, 2, 0)


async def test_a_receiver_that_restarts_knows_old_reservations_no_more(fleet):
    reserved = await fleet.at("d").ask(prep(PROMPT))
    await fleet.at("p").ask(send(reserved, PROMPT, 0, 4))
    await stop_actor(fleet.actors.pop("de"))
    await stop_actor(fleet.actors.pop("d"))
    await fleet.settle()
    fleet.actors["d"] = KvManager(KvManager.Config("d", LAYOUT, 16))
    await start_actor(fleet.nodes["d"], "d", fleet.actors["d"])
    with pytest.raises(StaleReservation):
        await fleet.at("p").ask(send(reserved, PROMPT, 4, 8))
    fresh = await fleet.at("d").ask(prep(PROMPT))
    sent = await fleet.at("p").ask(send(fresh, PROMPT))
    assert sent.num_bytes == 11 * LAYOUT.token_bytes


async def test_a_probe_changes_nothing(fleet):
    await fleet.at("p").ask(send(await fleet.at("d").ask(prep(PROMPT)), PROMPT))
    before = await fleet.stats("p")
    probed = await fleet.at("p").ask(Probe(pack_tokens(PROMPT)))
    assert (probed.num_cached_tokens, probed.free_blocks, probed.num_blocks) == (8, 16, 16)
    assert await fleet.stats("p") == before


@pytest.mark.parametrize("seed", range(10))
def test_many_requests_that_come_and_go_at_random_leak_nothing(seed):
    @in_virtual_time()
    async def run(fleet):
        rng, num_served = random.Random(seed), 0
        d, p = fleet.at("d"), fleet.at("p")

        async def serve(number):
            nonlocal num_served
            ids = [rng.randrange(2) for _ in range(rng.randrange(1, 24))]
            name = f"q{number}"
            reserved = await d.ask(prep(ids, rng.randrange(len(ids) + 1), request_id=name, wait_s=20.0))
            try:
                await p.ask(send(reserved, ids, request_id=name, wait_s=20.0))
                admitted = await d.ask(admit(ids, reserved.kv, sequence_id=name, wait_s=20.0))
                assert is_in_place(fleet, "d", ids, unpack_tokens(admitted.block_table), 0, admitted.num_cached_tokens)
                d.tell(finish(ids[: admitted.num_cached_tokens], admitted.block_table, sequence_id=name))
                num_served += 1
            except BaseException:
                d.tell(Finish("engine", name, b"", b""))
                raise
            finally:
                await asyncio.shield(asyncio.ensure_future(d.ask(Release(reserved.kv))))

        async def client(number):
            task = asyncio.ensure_future(serve(number))
            if number % 3 == 0:
                for _ in range(rng.randrange(60)):
                    await asyncio.sleep(0)
                task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                assert number % 3 == 0

        for batch in range(10):
            await asyncio.gather(*(client(batch * 12 + i) for i in range(12)))
        assert num_served >= 80
        await fleet.clock.sleep(30.0)
        for name in ("p", "d"):
            stats = await fleet.stats(name, recall=True)
            assert stats.free + stats.cached == 16
            assert stats.num_reservations == 0

    run()
