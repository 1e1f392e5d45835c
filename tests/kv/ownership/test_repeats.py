"""What is said twice at once, by callers one of whom leaves in the moment that both are granted."""

import asyncio

import pytest
from two_managers import PROMPT, Fleet, admit, in_virtual_time, prep

from callboard.actors.protocol import Finish


@pytest.mark.parametrize("leaves", [0, 1])
def test_of_two_who_wait_for_one_reservation_the_one_that_leaves_does_not_release_it(leaves: int) -> None:
    @in_virtual_time()
    async def test(fleet: Fleet) -> None:
        d, actor = fleet.at("d"), fleet.actors["d"]
        table = (await d.ask(admit(range(64)))).block_table
        asking = [asyncio.ensure_future(actor.on_prep_recv(prep(PROMPT, wait_s=100.0))) for _ in range(2)]
        await fleet.clock.sleep(1.0)
        assert not any(task.done() for task in asking)
        actor.on_finish(Finish("engine", "s", b"", table))  # Both are granted, ...
        asking[leaves].cancel()  # ... and one leaves before it could hear of it.
        reserved = await asking[1 - leaves]
        assert asking[leaves].cancelled()
        assert (await fleet.stats("d")).reserved == 3
        assert (await d.ask(prep(PROMPT))) == reserved

    test()


def test_a_reservation_that_all_who_waited_for_it_have_left_is_released() -> None:
    @in_virtual_time()
    async def test(fleet: Fleet) -> None:
        d, actor = fleet.at("d"), fleet.actors["d"]
        table = (await d.ask(admit(range(64)))).block_table
        asking = [asyncio.ensure_future(actor.on_prep_recv(prep(PROMPT, wait_s=100.0))) for _ in range(2)]
        await fleet.clock.sleep(1.0)
        actor.on_finish(Finish("engine", "s", b"", table))
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
        stats = await fleet.stats("d")
        assert (stats.free, stats.num_reservations) == (16, 0)

    test()


@pytest.mark.parametrize("leaves", [0, 1])
def test_of_two_who_wait_for_one_admission_the_one_that_leaves_does_not_end_it(leaves: int) -> None:
    @in_virtual_time()
    async def test(fleet: Fleet) -> None:
        d, actor = fleet.at("d"), fleet.actors["d"]
        table = (await d.ask(admit(range(64)))).block_table
        message = admit(PROMPT, sequence_id="t", wait_s=100.0)
        asking = [asyncio.ensure_future(actor.on_admit(message)) for _ in range(2)]
        await fleet.clock.sleep(1.0)
        actor.on_finish(Finish("engine", "s", b"", table))
        asking[leaves].cancel()
        admitted = await asking[1 - leaves]
        assert (await fleet.stats("d")).leased == 3
        assert (await d.ask(message)) == admitted

    test()
