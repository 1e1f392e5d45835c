"""A KV manager's pool: who gets blocks, who waits for them, and when they come back."""

import asyncio
import random

import pytest
from two_managers import PROMPT, admit, finish, in_virtual_time, is_in_place, prep, send

from callboard.actors.protocol import (
    Attach,
    BadRequest,
    CloseWrite,
    Finish,
    OpenWrite,
    Probe,
    Refill,
    Release,
    Seal,
    Tie,
)
from callboard.bus import FOREVER
from callboard.kv.layout import KvLayout, OutOfBlocks, StaleReservation
from callboard.kv.tokens import pack_tokens, unpack_tokens


async def test_an_engine_of_another_layout_is_refused(fleet):
    layout = KvLayout(num_layers=4, num_kv_heads=1, head_dim=2, block_size=4)
    async with fleet.at("d").stream(Attach("x", layout, fleet.at("d").address)) as items:
        with pytest.raises(BadRequest):
            await anext(items)


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
async def test_a_prep_recv_repeated_does_not_queue_behind_those_who_wait_for_its_blocks(fleet):
    held = await fleet.at("d").ask(prep(range(40), request_id="a"))
    waiting = asyncio.ensure_future(fleet.at("d").ask(prep(range(100, 140), request_id="b", wait_s=100.0)))
    await fleet.clock.sleep(1.0)
    assert not waiting.done()
    began = fleet.clock.now()
    assert await fleet.at("d").ask(prep(range(40), request_id="a")) == held
    assert fleet.clock.now() - began < 1.0
    await fleet.at("d").ask(Release(held.kv))
    assert (await waiting).num_cached_tokens == 0


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


async def test_an_engine_that_leaves_gives_back_what_it_held(fleet):
    admitted = await fleet.at("d").ask(admit(PROMPT))
    await fleet.at("d").ask(Refill("engine", 4))
    fleet.at("d").tell(Seal("engine", "s", pack_tokens(PROMPT), admitted.block_table))
    assert (await fleet.stats("d")).leased == 7
    fleet.actors["de"].tie.cancel()
    await fleet.settle()
    stats = await fleet.stats("d")
    assert (stats.free, stats.cached, stats.leased) == (14, 2, 0)


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
