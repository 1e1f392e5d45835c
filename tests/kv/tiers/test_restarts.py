"""A fleet of real processes that ends, by kill -9 or in order, and starts again warm: from what is on the disk."""

import asyncio
from pathlib import Path

import msgspec
from real_fleet import RealFleet, real_fleet
from waiting import PATIENCE_S, until

from callboard.actors.engine.simulated import Simulation, simulated_tokens
from callboard.actors.protocol import SamplingParams, StartGenerate, Usage
from callboard.kv.tokens import pack_tokens

SIMULATION = Simulation(num_layers=2)
FIRST, SECOND = [7 * i % 900 for i in range(500)], [11 * i % 900 + 1 for i in range(500)]
FULL = 500 // 16 * 16


async def start(fleet: RealFleet, cache: Path) -> None:
    engine, manager = fleet.engine("a", SIMULATION, num_blocks=64)
    (actor,) = manager.actors
    tiers = [{"kind": "disk", "num_bytes": 1 << 20, "path": str(cache)}]
    actor = msgspec.structs.replace(actor, config={**actor.config, "tiers": tiers, "fingerprint": "simulated"})
    (runs,) = engine.actors
    runs = msgspec.structs.replace(runs, config={**runs.config, "fingerprint": "simulated"})
    await fleet.start(
        msgspec.structs.replace(manager, actors=(actor,)), msgspec.structs.replace(engine, actors=(runs,))
    )


async def generate(fleet: RealFleet, prompt: list[int]) -> Usage:
    """Generate after a prompt; the tokens say whether all KV that was used is the right one."""
    message = StartGenerate("r", 0, pack_tokens(prompt), SamplingParams(max_tokens=8, ignore_eos=True))
    async with fleet.client.ref(fleet.address("a", "a")).stream(message, timeout=30) as items:
        tokens = [token async for token in items]
    assert [token.id for token in tokens] == simulated_tokens(prompt, 8, SIMULATION)
    usage = tokens[-1].usage
    assert usage is not None
    return usage


def num_files(cache: Path) -> int:
    return sum(path.suffix == ".kv" for path in cache.iterdir()) if cache.exists() else 0


async def test_a_fleet_that_was_killed_and_one_that_was_stopped_start_warm(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    async with asyncio.timeout(PATIENCE_S):
        async with real_fleet(tmp_path) as fleet:
            await start(fleet, cache)
            assert (await generate(fleet, FIRST)).num_computed_tokens == 500
            await until(lambda: num_files(cache) >= FULL // 16)
            await asyncio.gather(fleet.kill("kv-a"), fleet.kill("a"))
        async with real_fleet(tmp_path) as fleet:
            await start(fleet, cache)
            usage = await generate(fleet, FIRST)
            assert (usage.num_cached_tokens, usage.num_computed_tokens) == (FULL, 500 - FULL)
            assert (await generate(fleet, SECOND)).num_computed_tokens == 500
            await fleet.supervisor.stop()  # At once: what is not written yet is written on the way out.
        async with real_fleet(tmp_path) as fleet:
            await start(fleet, cache)
            for prompt in (SECOND, FIRST):
                assert (await generate(fleet, prompt)).num_computed_tokens == 500 - FULL
