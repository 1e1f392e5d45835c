"""Engines that name one device share one KV manager: prefill and decode over a single pool, on the virtual clock."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fleet import Fleet, at_once, running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.protocol import SamplingParams
from callboard.bus import VirtualClock
from callboard.bus.testing import run_virtual
from callboard.bus.transports.sim import SimHub
from callboard.kv.layout import OutOfBlocks

LAYOUT = SimulatedRunner(Simulation()).layout
SCRIPTS = ["round_robin", "disaggregate", "balanced"]
TWO_RESERVATIONS = """
from callboard.router import Fleet, Request, Tokens

async def route(request: Request, fleet: Fleet) -> Tokens:
    p, d = fleet.engines
    async with p.prep_recv(request, end=20) as first, d.prep_recv(request) as second:
        await p.remote_send(request, first)
        await d.remote_send(request, second)
        async for token in d.start_generate(request, kv=second):
            yield token
"""


@asynccontextmanager
async def fleet_of(script: str, *, seed: int = 0, **options: Any) -> AsyncIterator[Fleet]:
    settings = {"is_shared": True, "num_blocks": 64, **options}
    async with running_fleet(
        layout=LAYOUT, script=script, hub=SimHub(seed), clock=VirtualClock(), seed=seed, **settings
    ) as fleet:
        yield fleet


async def assert_all_are_served(fleet: Fleet, prompts: list[list[int]], *, max_tokens: int, within_s: float) -> None:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    async with asyncio.timeout(within_s):
        results = await at_once(fleet.generate, [(prompt, sampling) for prompt in prompts])
    assert [result.tokens for result in results] == [simulated_tokens(prompt, max_tokens) for prompt in prompts]
    await fleet.assert_nothing_leaks()


@pytest.mark.parametrize("script", SCRIPTS)
def test_prefill_and_decode_over_one_pool_give_the_right_tokens(script: str) -> None:
    async def story() -> None:
        async with fleet_of(script) as fleet:
            prompts = [[i, *range(length)] for i, length in enumerate([0, 14, 15, 16, 40, 100])]
            for _ in range(2):  # the second time they are cached
                await assert_all_are_served(fleet, prompts, max_tokens=9, within_s=5)
            sends = [item for item in await fleet.sub_requests() if item.verb == "remote_send" and item.lane]
            assert {item.lane for item in sends} == ({"pool"} if script != "round_robin" else set())
            assert [item.num_bytes for item in sends] == [0] * len(sends)

    run_virtual(story)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("num_blocks", [14, 20, 40])
def test_requests_that_together_outgrow_a_shared_pool_do_not_wait_for_each_other(script: str, num_blocks: int) -> None:
    async def story() -> None:
        async with fleet_of(script, num_blocks=num_blocks) as fleet:
            prompts = [[i, *range(100)] for i in range(8)]
            await assert_all_are_served(fleet, prompts, max_tokens=9, within_s=5)

    run_virtual(story)


@pytest.mark.parametrize("engines", [("a",), ("a", "b")])
def test_engines_that_prefill_for_each_other_do_not_wait_for_each_other(engines: tuple[str, ...]) -> None:
    async def story() -> None:
        async with fleet_of("disaggregate", engines=engines, is_shared=False, num_blocks=20) as fleet:
            prompts = [[i, *range(100)] for i in range(8)]
            await assert_all_are_served(fleet, prompts, max_tokens=9, within_s=5)

    run_virtual(story)


def test_a_prompt_that_does_not_fit_twice_is_refused_at_once_where_pages_are_copied_within_a_pool() -> None:
    async def story() -> None:
        async with fleet_of("disaggregate", num_blocks=13) as fleet:
            async with asyncio.timeout(1):
                with pytest.raises(OutOfBlocks, match="14 blocks"):
                    await fleet.generate([1, *range(100)])
            await fleet.assert_nothing_leaks()

    run_virtual(story)


def test_a_script_may_reserve_at_two_engines_of_one_pool(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_RESERVATIONS)

    async def story() -> None:
        async with fleet_of(str(script)) as fleet:
            await assert_all_are_served(fleet, [[1, *range(40)]], max_tokens=5, within_s=5)

    run_virtual(story)


@pytest.mark.parametrize("seed", range(12))
def test_a_mixed_load_with_cancellations_on_a_tiny_pool_ends_and_leaks_nothing(seed: int) -> None:
    async def story() -> None:
        rng = Random(seed)
        limits = {
            "max_num_seqs": rng.choice([1, 2, 8]),
            "max_num_batched_tokens": rng.choice([8, 64]),
            "max_buffered_tokens": rng.choice([4, 256]),
            "simulated": Simulation(seconds_per_step=rng.choice([0.0, 0.001, 0.01])),
        }
        engines = rng.choice([("p", "d"), ("a", "b"), ("p", "d1", "d2"), ("a",)])
        options = {"engines": engines, "is_shared": rng.random() < 0.7, "num_blocks": rng.choice([18, 30])}
        async with fleet_of(rng.choice(SCRIPTS), seed=seed, **options, **limits) as fleet:

            async def one(i: int) -> None:
                await asyncio.sleep(rng.uniform(0, 2))
                prompt = [i % 7, *range(rng.choice([0, 1, 15, 16, 33, 100, 119]))]
                sampling = SamplingParams(max_tokens=rng.randrange(1, 50), ignore_eos=True)
                try:
                    async with asyncio.timeout(rng.choice([rng.uniform(0, 0.5), 1000, 1000])):
                        got = await fleet.generate(prompt, sampling, request_id=f"r{i}")
                except TimeoutError:
                    return
                assert got.tokens == simulated_tokens(prompt, sampling.max_tokens)

            async with asyncio.TaskGroup() as group:
                for i in range(40):
                    group.create_task(one(i))
            await fleet.assert_nothing_leaks()

    run_virtual(story)
