"""A writer that stands still in the middle of a copy, past its lease, and then goes on (SIGSTOP, SIGCONT)."""

import asyncio
from contextlib import nullcontext

import pytest
from chaos.planted import a_block_returned_in_flight
from hall import LEASE_S, LINKS, OTHER, Hall, in_a_hall
from two_managers import PROMPT, is_in_place

from callboard.actors.protocol import Release
from callboard.kv.layout import OutOfBlocks


def test_a_copy_in_simulation_stands_still_between_its_pages() -> None:
    async def test(hall: Hall) -> None:
        reserved = await hall.half_written()
        before = hall.pages(reserved)
        await asyncio.sleep(0.5)
        assert hall.pages(reserved) == before
        (run,) = reserved.kv.slots
        table = [run.slot // 4 + i for i in range(3)]
        assert is_in_place(hall, "d", PROMPT, table, 0, 1) is False
        assert before.count(0xA5) > len(before) // 4, "most of it has still to come"

    in_a_hall(test)


@pytest.mark.parametrize("how", ["its lease ran out", "it was released"])
@pytest.mark.parametrize("is_quarantined", [True, False])
def test_a_writer_that_goes_on_past_its_lease_touches_no_block_that_has_a_new_owner(
    is_quarantined: bool, how: str
) -> None:
    async def test(hall: Hall) -> None:
        reserved = await hall.half_written()
        if how == "it was released":
            await hall.at("d").ask(Release(reserved.kv))
        await asyncio.sleep(LINKS.silent_s + 3 * LEASE_S)  # d has given the link up, and then the lease has run out.
        stats = await hall.stats("d")
        assert (stats.quarantined, stats.free) == ((3, 3) if is_quarantined else (0, 6))
        tables = [await hall.lend("first")]
        if is_quarantined:
            with pytest.raises(OutOfBlocks):
                await hall.lend("second")
        else:
            tables.append(await hall.lend("second"))
        before = hall.pages(reserved)
        hall.writer.resume()
        await asyncio.sleep(1.0)
        assert hall.pages(reserved) != before, "it did not go on"
        intact = [is_in_place(hall, "d", OTHER, table, 0, 11) for table in tables]
        assert all(intact) is is_quarantined
        stats = await hall.stats("d")
        if is_quarantined:
            # It has said that it will never write again: now they are free.
            assert (stats.quarantined, stats.free, stats.problems) == (0, 3, ())

    with nullcontext() if is_quarantined else a_block_returned_in_flight():
        in_a_hall(test)


def test_a_block_that_is_written_while_it_is_free_is_a_problem_of_its_pool() -> None:
    async def test(hall: Hall) -> None:
        reserved = await hall.half_written()
        await hall.at("d").ask(Release(reserved.kv))
        hall.writer.resume()
        await asyncio.sleep(1.0)
        assert any("written while it was free" in problem for problem in (await hall.stats("d")).problems)

    with a_block_returned_in_flight():
        in_a_hall(test)


def test_the_successor_of_a_writer_that_died_out_of_sight_frees_what_it_was_writing() -> None:
    async def test(hall: Hall) -> None:
        await hall.half_written()
        hall.writer.resume()
        hall.writer.kill()  # On another host: all that d sees is that the link breaks.
        await asyncio.sleep(60.0)
        assert (await hall.stats("d")).quarantined == 3
        await hall.restart_writer()
        await asyncio.sleep(5.0)
        stats = await hall.stats("d")
        assert (stats.quarantined, stats.free, stats.problems) == (0, 6, ())

    in_a_hall(test)
