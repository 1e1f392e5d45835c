"""KV sent from one manager to another: what arrives, what is refused, what a failure leaves behind."""

import asyncio

import msgspec
import pytest
from two_managers import LAYOUT, PROMPT, admit, finish, in_virtual_time, is_in_place, prep, running, send

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.kv_manager import KvManager
from callboard.actors.protocol import Admit, PrepRecv, Release, RemoteSend
from callboard.bus import ActorDied, UnknownActor
from callboard.kv.layout import BadRange, SlotRun, StaleReservation
from callboard.kv.tokens import pack_tokens, unpack_tokens


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
    assert second.num_bytes == 2 * LAYOUT.token_bytes  # The whole block changed hands.
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
    assert (sent.lane, sent.num_bytes) == ("pool", 0)
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


@pytest.mark.parametrize("slots", [(SlotRun(40, 11),), (SlotRun(0, 11),), ()])
async def test_the_slots_of_an_address_are_not_believed(slots):
    async with running() as fleet:
        other = await fleet.at("d").ask(prep([1], request_id="other"))
        reserved = await fleet.at("d").ask(prep(PROMPT))
        forged = msgspec.structs.replace(reserved.kv, slots=slots)
        before = bytes(fleet.actors["d"].store.slot(0, 0, other.kv.slots[0].slot))
        await fleet.at("p").ask(RemoteSend("r", 0, pack_tokens(PROMPT), forged, 0, 11, "engine"))
        admitted = await fleet.at("d").ask(admit(PROMPT, reserved.kv))
        assert is_in_place(fleet, "d", PROMPT, unpack_tokens(admitted.block_table), 0, 11)
        assert bytes(fleet.actors["d"].store.slot(0, 0, other.kv.slots[0].slot)) == before


@pytest.mark.parametrize("sender", ["p", "d"], ids=["between pools", "inside a pool"])
async def test_the_kv_of_another_prompt_is_never_sealed_under_a_reservations_own(fleet, sender):
    reserved = await fleet.at("d").ask(prep(PROMPT))
    another = [*PROMPT[:4], 99, *PROMPT[5:]]
    with pytest.raises(StaleReservation, match="another prompt"):
        await fleet.at(sender).ask(send(reserved, another))
    assert (await fleet.stats("d")).cached == 0
    # What lies behind the range that is sent may be anything: a script may reserve room for more.
    await fleet.at(sender).ask(send(reserved, another, 0, 4))
    await fleet.at(sender).ask(send(reserved, PROMPT, 4, 11))
    admitted = await fleet.at("d").ask(admit(PROMPT, reserved.kv))
    assert is_in_place(fleet, "d", PROMPT, unpack_tokens(admitted.block_table), 0, 11)


async def test_an_engine_that_is_not_attached_is_unknown(fleet):
    reserved = await fleet.at("d").ask(prep(PROMPT))
    message = RemoteSend("r", 0, pack_tokens(PROMPT), reserved.kv, 0, 11, "nobody")
    with pytest.raises(UnknownActor):
        await fleet.at("p").ask(message)
    with pytest.raises(UnknownActor):
        await fleet.at("d").ask(Admit("nobody", "s", b""))


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
