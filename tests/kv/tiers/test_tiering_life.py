"""A manager with tiers under load, and with a disk that hangs, fills up, goes away, or is written to at the end."""

import asyncio
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
from tiered_managers import BLOCK_BYTES, FIRST, SECOND, run, tiers
from two_managers import Fleet, admit, finish, in_virtual_time, is_in_place, prep, running, send
from waiting import PATIENCE_S

from callboard.actors.actor import stop_actor
from callboard.actors.kv_manager import tiering
from callboard.actors.protocol import Finish, Release
from callboard.kv.tokens import unpack_tokens


@pytest.mark.parametrize("kinds", ["host", "disk", "host+disk"])
@pytest.mark.parametrize("seed", range(3))
def test_many_requests_over_tiny_pools_get_what_is_theirs_and_leak_nothing(
    seed: int, kinds: str, tmp_path: Path
) -> None:
    config = tiers(kinds, tmp_path, host_bytes=20 * BLOCK_BYTES, disk_bytes=40 * 400)
    rng, num_served, num_hits = random.Random(seed), 0, 0

    @in_virtual_time(p_config=config, d_config=config)  # Both keep their blocks in one directory.
    async def test(fleet: Fleet) -> None:
        nonlocal num_hits
        d, p = fleet.at("d"), fleet.at("p")

        async def transfer(ids: list[int], name: str) -> None:
            reserved = await d.ask(prep(ids, rng.randrange(len(ids) + 1), request_id=name, wait_s=20.0))
            try:
                await p.ask(send(reserved, ids, request_id=name, wait_s=20.0))
                admitted = await d.ask(admit(ids, reserved.kv, sequence_id=name, wait_s=20.0))
                assert is_in_place(fleet, "d", ids, unpack_tokens(admitted.block_table), 0, admitted.num_cached_tokens)
                d.tell(finish(ids[: admitted.num_cached_tokens], admitted.block_table, sequence_id=name))
            except BaseException:
                d.tell(Finish("engine", name, b"", b""))
                raise
            finally:
                await asyncio.shield(asyncio.ensure_future(d.ask(Release(reserved.kv))))

        async def client(number: int) -> None:
            nonlocal num_served
            # Few beginnings, and long ones: they come back, and do not all fit.
            ids = [rng.randrange(8), *range(10, 10 + rng.randrange(1, 55))]
            serve = transfer(ids, f"q{number}") if rng.random() < 0.5 else run(fleet, ids, sequence_id=f"q{number}")
            task = asyncio.ensure_future(serve)
            if number % 5 == 0:
                for _ in range(rng.randrange(60)):
                    await asyncio.sleep(0)
                task.cancel()
            try:
                await task
                num_served += 1
            except asyncio.CancelledError:
                d.tell(Finish("engine", f"q{number}", b"", b""))

        for batch in range(8):
            await asyncio.gather(*(client(batch * 10 + i) for i in range(10)))
        await fleet.clock.sleep(30.0)
        for name in ("p", "d"):
            stats = await fleet.stats(name, recall=True)
            assert (stats.free + stats.cached, stats.num_reservations) == (16, 0)
            found = fleet.actors[name].tiers
            num_hits += found.num_hit_tokens
            for tier in (found.host, found.disk):
                if tier is not None:
                    assert tier.index.check_integrity() == []
                    assert tier.index.num_bytes <= tier.index.most_bytes

    test()
    assert num_served >= 60
    assert num_hits > 20


async def test_a_disk_that_hangs_costs_a_request_its_patience_and_no_more(tmp_path: Path) -> None:
    async with running(d_config=tiers("disk", tmp_path)) as fleet:
        await run(fleet, FIRST)
        await run(fleet, SECOND)
        async with asyncio.timeout(PATIENCE_S):
            while fleet.actors["d"].tiers.disk.index.num_bytes < 26 * BLOCK_BYTES:
                await asyncio.sleep(0.01)
        hangs = threading.Event()
        stuck = asyncio.ensure_future(fleet.actors["d"].tiers.disk._reader.run(hangs.wait, 20))
        try:
            assert await run(fleet, FIRST) == 0
            assert not stuck.done()
        finally:
            hangs.set()
        await stuck
        assert await run(fleet, SECOND) == 64


def test_a_directory_that_goes_away_is_no_matter(tmp_path: Path) -> None:
    @in_virtual_time(d_config=tiers("disk", tmp_path))
    async def test(fleet: Fleet) -> None:
        await run(fleet, FIRST)
        await run(fleet, SECOND)
        shutil.rmtree(tmp_path / "cache")
        assert await run(fleet, FIRST) == 0
        for ids in (SECOND, FIRST, SECOND):
            await fleet.clock.sleep(100.0)
            await run(fleet, ids)
        assert await run(fleet, FIRST) == 40

    test()


def test_a_disk_that_takes_nothing_is_tried_again_ever_more_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tries = 0

    def full(fd: int, data: bytes) -> int:
        nonlocal num_tries
        num_tries += 1
        raise OSError(28, os.strerror(28))

    @in_virtual_time(d_config=tiers("disk", tmp_path))
    async def test(fleet: Fleet) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            for _ in range(5):
                await run(fleet, FIRST)
                await run(fleet, SECOND)
            await fleet.clock.sleep(100.0)
            assert 3 <= num_tries <= 10
            assert not any(path.suffix == ".part" for path in (tmp_path / "cache").iterdir())
        await fleet.clock.sleep(1000.0)
        for ids in (FIRST, SECOND):
            await run(fleet, ids)
            await fleet.clock.sleep(100.0)
        assert await run(fleet, FIRST) == 40

    test()


async def test_a_manager_that_stops_writes_what_it_has(tmp_path: Path) -> None:
    async with running(d_config=tiers("disk", tmp_path)) as fleet:
        await run(fleet, FIRST)
        await stop_actor(fleet.actors.pop("d"))
        assert len(list((tmp_path / "cache").glob("*.kv"))) == 10


async def test_a_manager_that_stops_does_not_wait_for_a_disk_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiering, "FLUSH_S", 0.05)
    async with running(d_config=tiers("disk", tmp_path)) as fleet:
        manager = fleet.actors["d"]
        hangs = threading.Event()
        stuck = asyncio.ensure_future(manager.tiers.disk._writer.run(hangs.wait, 20))
        try:
            await run(fleet, FIRST)
            await stop_actor(fleet.actors.pop("d"))
            assert not stuck.done()
        finally:
            hangs.set()
        await stuck
