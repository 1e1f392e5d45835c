"""What is said twice, too late, or in another order, at managers over real messages: each has a defined answer."""

import asyncio

import pytest
from two_managers import LAYOUT, PROMPT, Fleet, admit, in_virtual_time, is_in_place, prep, send

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.kv_manager import KvManager
from callboard.actors.protocol import CloseWrite, Done, OpenWrite, Release, Reserved, Tie
from callboard.bus import FOREVER
from callboard.kv.layout import BadRange, StaleReservation
from callboard.kv.tokens import unpack_tokens


def opening(reserved: Reserved, write_id: str, begin: int, end: int) -> OpenWrite:
    return OpenWrite(reserved.kv.reservation_id, reserved.kv.epoch, write_id, begin, end)


def closing(reserved: Reserved, write_id: str, *, is_complete: bool = True) -> CloseWrite:
    return CloseWrite(reserved.kv.reservation_id, reserved.kv.epoch, write_id, is_complete)


@in_virtual_time()
async def test_a_write_that_is_opened_twice_is_one(fleet: Fleet) -> None:
    d, reserved = fleet.at("d"), await fleet.at("d").ask(prep(PROMPT))
    message = opening(reserved, "w", 0, 11)
    assert await d.ask(message) == await d.ask(message)
    assert await d.ask(closing(reserved, "w")) == Done()
    assert (await fleet.stats("d")).reserved == 3
    with pytest.raises(StaleReservation, match="closed already"):
        await d.ask(message)
    assert await d.ask(closing(reserved, "w")) == Done()


@in_virtual_time()
async def test_a_close_that_overtakes_its_open_keeps_it_out(fleet: Fleet) -> None:
    d, reserved = fleet.at("d"), await fleet.at("d").ask(prep(PROMPT))
    # Over another link, as after a break: nothing orders the two.
    other = fleet.nodes["p"].ref(d.address)
    assert await other.ask(closing(reserved, "w", is_complete=False)) == Done()
    with pytest.raises(StaleReservation, match="closed already"):
        await d.ask(opening(reserved, "w", 0, 11))
    await fleet.at("p").ask(send(reserved, PROMPT))
    table = unpack_tokens((await d.ask(admit(PROMPT, reserved.kv))).block_table)
    assert is_in_place(fleet, "d", PROMPT, table, 0, 11)


@in_virtual_time()
async def test_a_write_that_was_closed_as_failed_is_not_complete_by_a_second_word(fleet: Fleet) -> None:
    d, reserved = fleet.at("d"), await fleet.at("d").ask(prep(PROMPT))
    await d.ask(opening(reserved, "w", 0, 11))
    await d.ask(closing(reserved, "w", is_complete=False))
    with pytest.raises(StaleReservation, match="has been ended"):
        await d.ask(closing(reserved, "w", is_complete=True))
    admitting = asyncio.ensure_future(d.ask(admit(PROMPT, reserved.kv)))
    await fleet.clock.sleep(1.0)
    assert not admitting.done(), "it is not sealed"
    await fleet.at("p").ask(send(reserved, PROMPT))
    table = unpack_tokens((await admitting).block_table)
    assert is_in_place(fleet, "d", PROMPT, table, 0, 11)


@in_virtual_time()
async def test_a_release_after_the_lease_ends_nobody_elses_reservation(fleet: Fleet) -> None:
    d, first = fleet.at("d"), await fleet.at("d").ask(prep(PROMPT))
    await fleet.clock.sleep(10.1)
    second = await d.ask(prep(PROMPT))
    assert second.kv.reservation_id != first.kv.reservation_id
    for _ in range(2):
        assert await d.ask(Release(first.kv)) == Done()
    assert (await fleet.stats("d")).reserved == 3
    await d.ask(Release(second.kv))
    assert (await fleet.stats("d")).free == 16


@in_virtual_time()
async def test_a_receiver_that_restarts_before_the_write_refuses_it_and_nothing_leaks(fleet: Fleet) -> None:
    reserved = await fleet.at("d").ask(prep(PROMPT))
    await stop_actor(fleet.actors.pop("de"))
    await stop_actor(fleet.actors.pop("d"))
    fleet.actors["d"] = KvManager(KvManager.Config("d", LAYOUT, 16))
    await start_actor(fleet.nodes["d"], "d", fleet.actors["d"])
    d, computed = fleet.at("d"), fleet.actors["pe"].num_computed
    for to, message in (
        (d, opening(reserved, "w", 0, 11)),
        (d, closing(reserved, "w")),
        (fleet.at("p"), send(reserved, PROMPT)),
    ):
        with pytest.raises(StaleReservation, match="restarted"):
            await to.ask(message)
    with pytest.raises(StaleReservation, match="restarted"):
        async with d.stream(Tie(reserved.kv.epoch), timeout=FOREVER) as items:
            await anext(items)
    await d.ask(Release(reserved.kv))
    assert fleet.actors["pe"].num_computed == computed, "an engine computed for nobody"
    for name in ("p", "d"):
        assert (await fleet.stats(name)).free == 16


@pytest.mark.parametrize("middle", range(1, 11))
def test_two_senders_at_once_meet_anywhere_token_for_token(middle: int) -> None:
    @in_virtual_time()
    async def test(fleet: Fleet) -> None:
        d, reserved = fleet.at("d"), await fleet.at("d").ask(prep(PROMPT))
        first, second, admitted = await asyncio.gather(
            fleet.at("p").ask(send(reserved, PROMPT, 0, middle)),
            d.ask(send(reserved, PROMPT, middle, 11)),
            d.ask(admit(PROMPT, reserved.kv)),
        )
        assert is_in_place(fleet, "d", PROMPT, unpack_tokens(admitted.block_table), 0, 11)
        assert first.num_bytes == middle * LAYOUT.token_bytes
        # Of its own, the receiver copies what is in a block with what the other brings, and hands the rest over.
        shared = -middle % 4 if middle < 8 else 11 - middle if middle % 4 else 0
        assert second.num_bytes == min(shared, 11 - middle) * LAYOUT.token_bytes

    test()


@in_virtual_time()
async def test_of_two_writers_of_one_token_the_second_is_refused(fleet: Fleet) -> None:
    reserved = await fleet.at("d").ask(prep(PROMPT))
    fleet.actors["pe"].may_compute.clear()
    first = asyncio.ensure_future(fleet.at("p").ask(send(reserved, PROMPT, 0, 7)))
    await fleet.clock.sleep(0.5)
    with pytest.raises(BadRange, match="another write"):
        await fleet.at("d").ask(send(reserved, PROMPT, 6, 11))
    fleet.actors["pe"].may_compute.set()
    await first
    with pytest.raises(BadRange, match="another write"):
        await fleet.at("d").ask(send(reserved, PROMPT, 6, 11))
    await fleet.at("d").ask(send(reserved, PROMPT, 7, 11))
    table = unpack_tokens((await fleet.at("d").ask(admit(PROMPT, reserved.kv))).block_table)
    assert is_in_place(fleet, "d", PROMPT, table, 0, 11)


@in_virtual_time()
async def test_what_a_sender_left_half_written_is_written_by_another(fleet: Fleet) -> None:
    d, reserved = fleet.at("d"), await fleet.at("d").ask(prep(PROMPT))
    async with d.stream(Tie(reserved.kv.epoch), timeout=FOREVER) as items:
        await anext(items)
        opened = await d.ask(opening(reserved, "w", 0, 11))
        for slot in range(opened.slots[0].slot, opened.slots[0].slot + 5):
            fleet.actors["d"].store.slot(0, 0, slot)[:] = b"nonsense"
        with pytest.raises(BadRange, match="another write"):
            await fleet.at("p").ask(send(reserved, PROMPT))
    await fleet.clock.sleep(0.1)
    # It is known to be gone: its tokens may be written, and no block was given back meanwhile.
    assert (await fleet.stats("d")).reserved == 3
    await fleet.at("p").ask(send(reserved, PROMPT))
    table = unpack_tokens((await d.ask(admit(PROMPT, reserved.kv))).block_table)
    assert is_in_place(fleet, "d", PROMPT, table, 0, 11)
