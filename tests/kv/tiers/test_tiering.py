"""A manager with tiers: what is evicted comes back byte for byte, to whoever asks for it, by whichever verb."""

import asyncio
from pathlib import Path

import pytest
from tiered_managers import BLOCK_BYTES, FIRST, SECOND, THIRD, compute, run, tiers
from two_managers import Fleet, admit, finish, in_virtual_time, is_in_place, prep, send

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.kv_manager import KvManager, spill
from callboard.actors.kv_manager.report import counters_of
from callboard.actors.protocol import Counters, Finish, Probe, Release
from callboard.bus.taps import SPAN, TapRecord
from callboard.kv.tokens import pack_tokens, unpack_tokens


def counters(fleet: Fleet, at: str = "d") -> Counters:
    manager = fleet.actors[at]
    counted: Counters = manager.tiers.counted(counters_of(manager))
    return counted


@pytest.mark.parametrize("kinds", ["host", "disk", "host+disk"])
def test_what_was_evicted_comes_back_on_a_hit(kinds: str, tmp_path: Path) -> None:
    @in_virtual_time(d_config=tiers(kinds, tmp_path))
    async def test(fleet: Fleet) -> None:
        assert [await run(fleet, ids) for ids in (FIRST, SECOND)] == [0, 0]
        probed = await fleet.at("d").ask(Probe(pack_tokens(FIRST)))
        assert (probed.num_cached_tokens, probed.num_tier_tokens) == (0, 40)
        assert await run(fleet, FIRST) == 40
        probed = await fleet.at("d").ask(Probe(pack_tokens(FIRST)))
        assert (probed.num_cached_tokens, probed.num_tier_tokens) == (40, 0)
        assert await run(fleet, [*FIRST[:20], *SECOND[:20]]) == 20
        assert await run(fleet, SECOND) == 64
        assert counters(fleet).num_tier_hit_tokens == 100

    test()


def test_without_tiers_nothing_comes_back() -> None:
    @in_virtual_time()
    async def test(fleet: Fleet) -> None:
        assert [await run(fleet, ids) for ids in (FIRST, SECOND, FIRST)] == [0, 0, 0]
        assert (await fleet.at("d").ask(Probe(pack_tokens(SECOND)))).num_tier_tokens == 0

    test()


def test_a_reservation_and_a_send_find_what_is_on_the_disk(tmp_path: Path) -> None:
    @in_virtual_time(p_config=tiers("disk", tmp_path), d_config=tiers("disk", tmp_path / "d"))
    async def test(fleet: Fleet) -> None:
        for at in ("p", "d"):
            await run(fleet, FIRST, at=at)
            await run(fleet, SECOND, at=at)
        longer = [*FIRST, 1, 2, 3]
        reserved = await fleet.at("d").ask(prep(longer))
        assert (reserved.begin, reserved.num_cached_tokens) == (40, 40)
        await fleet.at("d").ask(Release(reserved.kv))
        other = [*THIRD[:4], *longer]
        await run(fleet, other[:40], at="p")
        await run(fleet, SECOND, at="p")
        reserved = await fleet.at("d").ask(prep(other))
        sent = await fleet.at("p").ask(send(reserved, other))
        assert (sent.num_computed_tokens, sent.num_reused_tokens) == (7, 40)
        admitted = await fleet.at("d").ask(admit(other, reserved.kv))
        assert is_in_place(fleet, "d", other, unpack_tokens(admitted.block_table), 0, 47)

    test()


def test_a_send_of_what_is_all_on_the_disk_wakes_no_engine(tmp_path: Path) -> None:
    @in_virtual_time(p_config=tiers("disk", tmp_path))
    async def test(fleet: Fleet) -> None:
        await run(fleet, FIRST, at="p")
        await run(fleet, SECOND, at="p")
        reserved = await fleet.at("d").ask(prep(FIRST, 38))
        assert (await fleet.at("p").ask(send(reserved, FIRST))).num_computed_tokens == 0
        assert fleet.actors["pe"].num_computed == 0

    test()


def test_the_next_life_of_a_manager_starts_warm(tmp_path: Path) -> None:
    @in_virtual_time(d_config=tiers("disk", tmp_path))
    async def test(fleet: Fleet) -> None:
        await run(fleet, FIRST)
        await stop_actor(fleet.actors.pop("d"))
        fleet.actors["new"] = manager = KvManager(
            KvManager.Config("new", fleet.actors["p"].config.layout, 16, **tiers("disk", tmp_path))
        )
        ref = await start_actor(await fleet.node("new"), "new", manager)
        assert (await fleet.at("new").ask(Probe(pack_tokens(FIRST)))).num_tier_tokens == 40
        await fleet.engine("newe", ref)
        assert await run(fleet, FIRST, at="new") == 40

    test()


def test_two_who_want_the_same_share_one_reading_of_it(tmp_path: Path) -> None:
    @in_virtual_time(d_config=tiers("disk", tmp_path))
    async def test(fleet: Fleet) -> None:
        await run(fleet, FIRST)
        await run(fleet, SECOND)
        wanted = ([*FIRST, 1], [*FIRST[:30], 2], [*FIRST, 3])
        found = await asyncio.gather(*(fleet.at("d").ask(admit(ids, sequence_id=str(ids[-1]))) for ids in wanted))
        assert [admitted.num_cached_tokens for admitted in found] == [40, 28, 40]
        assert counters(fleet).num_tier_bytes_read == 10 * BLOCK_BYTES
        tables = [unpack_tokens(admitted.block_table) for admitted in found]
        assert tables[0][:10] == tables[2][:10]

    test()


def test_a_request_that_leaves_while_it_waits_for_a_tier_leaks_nothing(tmp_path: Path) -> None:
    @in_virtual_time(d_config=tiers("disk", tmp_path))
    async def test(fleet: Fleet) -> None:
        await run(fleet, FIRST)
        await run(fleet, SECOND)
        for num_steps in range(12):
            waiting = asyncio.ensure_future(fleet.at("d").ask(admit(FIRST, sequence_id="t")))
            for _ in range(num_steps):
                await asyncio.sleep(0)
            waiting.cancel()
            fleet.at("d").tell(Finish("engine", "t", b"", b""))
            await fleet.settle()
            stats = await fleet.stats("d")
            assert stats.free + stats.cached == 16
        assert await run(fleet, FIRST) == 40

    test()


@pytest.mark.parametrize("kinds", ["host", "disk", "host+disk"])
def test_what_is_evicted_before_it_was_written_is_saved(kinds: str, tmp_path: Path) -> None:
    @in_virtual_time(d_config=tiers(kinds, tmp_path))
    async def test(fleet: Fleet) -> None:
        blocks = fleet.actors["d"].blocks
        for ids in (FIRST, SECOND):  # In one pass of the loop.
            table = blocks.admit("engine", "s", pack_tokens(ids)).block_table
            compute(fleet, "d", ids, table, 0)
            blocks.finish("engine", "s", pack_tokens(ids), table)
        # Right now, out of the place where they wait to be written; later, out of the tier.
        assert await run(fleet, FIRST) == 40
        assert await run(fleet, SECOND) == 64
        assert counters(fleet).num_tier_dropped_blocks == 0

    test()


def test_what_there_is_no_room_for_is_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "MOST_STAGED", 3 * BLOCK_BYTES)

    @in_virtual_time(d_config=tiers("disk", tmp_path))
    async def test(fleet: Fleet) -> None:
        blocks = fleet.actors["d"].blocks
        for ids in (FIRST, SECOND):
            table = blocks.admit("engine", "s", pack_tokens(ids)).block_table
            compute(fleet, "d", ids, table, 0)
            blocks.finish("engine", "s", pack_tokens(ids), table)
        assert counters(fleet).num_tier_dropped_blocks == 7
        await fleet.clock.sleep(1.0)
        # The tail was evicted first, and so was saved; what it continues was not, so that nobody finds it.
        assert await run(fleet, FIRST) == 0

    test()


def test_a_small_host_tier_gives_way_to_the_disk(tmp_path: Path) -> None:
    @in_virtual_time(d_config=tiers("host+disk", tmp_path, host_bytes=12 * BLOCK_BYTES))
    async def test(fleet: Fleet) -> None:
        for ids in (FIRST, SECOND, THIRD, FIRST):
            await run(fleet, ids)
        for ids in (SECOND, THIRD, FIRST):
            assert await run(fleet, ids) == len(ids)
        assert fleet.actors["d"].tiers.host.index.num_bytes <= 12 * BLOCK_BYTES

    test()


def test_who_had_to_wait_for_blocks_finds_what_the_tiers_hold_in_those_it_gets(tmp_path: Path) -> None:
    @in_virtual_time(d_config=tiers("disk", tmp_path))
    async def test(fleet: Fleet) -> None:
        await run(fleet, FIRST)
        await run(fleet, SECOND)
        held = await fleet.at("d").ask(admit(THIRD, sequence_id="t"))
        waiting = asyncio.ensure_future(fleet.at("d").ask(admit(FIRST, wait_s=5.0)))
        await fleet.clock.sleep(1.0)
        assert not waiting.done()
        assert counters(fleet).num_tier_bytes_read == 0  # There is no room for it yet.
        compute(fleet, "d", THIRD, unpack_tokens(held.block_table), 0)
        fleet.at("d").tell(finish(THIRD, held.block_table, sequence_id="t"))
        admitted = await waiting
        table = unpack_tokens(admitted.block_table)
        assert admitted.num_cached_tokens == 40
        assert is_in_place(fleet, "d", FIRST, table, 0, 40)
        assert await fleet.at("d").ask(admit(FIRST, wait_s=5.0)) == admitted
        fleet.at("d").tell(finish(FIRST, admitted.block_table))
        assert await run(fleet, FIRST) == 40
        stats = await fleet.stats("d")
        assert stats.free + stats.cached == 16

    test()


def test_a_send_that_had_to_wait_for_blocks_leaves_its_engine_the_last_block(tmp_path: Path) -> None:
    @in_virtual_time(p_config=tiers("disk", tmp_path))
    async def test(fleet: Fleet) -> None:
        await run(fleet, FIRST, at="p")
        await run(fleet, SECOND, at="p")
        held = await fleet.at("p").ask(admit(THIRD, sequence_id="t"))
        reserved = await fleet.at("d").ask(prep(FIRST))
        sending = asyncio.ensure_future(fleet.at("p").ask(send(reserved, FIRST, wait_s=5.0)))
        await fleet.clock.sleep(1.0)
        assert not sending.done()
        fleet.at("p").tell(Finish("engine", "t", b"", held.block_table))
        sent = await sending
        assert (sent.num_computed_tokens, sent.num_reused_tokens) == (4, 36)
        admitted = await fleet.at("d").ask(admit(FIRST, reserved.kv))
        assert is_in_place(fleet, "d", FIRST, unpack_tokens(admitted.block_table), 0, 40)

    test()


@pytest.mark.parametrize("num_steps", range(0, 16, 3))
def test_who_leaves_or_asks_again_while_its_blocks_are_filled_leaks_and_breaks_nothing(
    num_steps: int, tmp_path: Path
) -> None:
    @in_virtual_time(d_config=tiers("disk", tmp_path))
    async def test(fleet: Fleet) -> None:
        await run(fleet, FIRST)
        await run(fleet, SECOND)
        for asks_again in (True, False):
            held = await fleet.at("d").ask(admit(THIRD, sequence_id="t"))
            waiting = asyncio.ensure_future(fleet.at("d").ask(admit(FIRST, wait_s=5.0)))
            await fleet.clock.sleep(1.0)
            fleet.at("d").tell(Finish("engine", "t", b"", held.block_table))
            for _ in range(num_steps):
                await asyncio.sleep(0)
            if asks_again:
                admitted = await fleet.at("d").ask(admit(FIRST, wait_s=5.0))
                table = unpack_tokens(admitted.block_table)
                assert is_in_place(fleet, "d", FIRST, table, 0, admitted.num_cached_tokens)
            waiting.cancel()
            fleet.at("d").tell(Finish("engine", "s", b"", b""))
            await fleet.settle()
            stats = await fleet.stats("d")
            assert stats.free + stats.cached == 16
            await run(fleet, SECOND)

    test()


def test_it_is_noted_how_long_a_request_waited_for_a_tier(tmp_path: Path) -> None:
    noted = []

    @in_virtual_time(d_config=tiers("disk", tmp_path))
    async def test(fleet: Fleet) -> None:
        await run(fleet, FIRST)
        await run(fleet, SECOND)
        fleet.nodes["d"].follow(lambda row, message: noted.append(TapRecord(*row)))
        await fleet.at("d").ask(prep(FIRST, request_id="r"))

    test()
    (record,) = [record for record in noted if record.what == SPAN and record.name == "tier"]
    assert record.request_id == "r"
