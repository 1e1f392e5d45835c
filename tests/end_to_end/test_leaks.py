"""Whatever clients do, every block comes back: a third of the requests is cancelled at a random moment."""

import asyncio
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
from fleet import Fleet, running_fleet
from oracle import assert_tokens_pass_oracle
from tiny_models import random_prompt
from waiting import PATIENCE_S

from callboard.actors.engine.simulated import SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.protocol import SamplingParams
from callboard.bus import VirtualClock
from callboard.bus.testing import run_virtual
from callboard.bus.transports.sim import SimHub

AT_ONCE = 12


async def wait_until_engines_are_idle(fleet: Fleet) -> None:
    async with asyncio.timeout(PATIENCE_S):
        for actor in fleet.actors.values():
            scheduler = getattr(actor, "scheduler", None)
            while scheduler is not None and len(scheduler):
                await asyncio.sleep(0.01)
            if scheduler is not None:
                scheduler.check_integrity()


@pytest.mark.parametrize(("script", "num_requests"), [("disaggregate", 500), ("balanced", 150)])
async def test_nothing_leaks_when_a_third_of_the_requests_is_cancelled(
    script: str, num_requests: int, tiny: Callable
) -> None:
    # Before prep_recv answers, during the transfer, mid-decode: delays are drawn from how long requests take here.
    path, layout, model = tiny("llama3")
    rng = Random(script)
    fates: Counter[str] = Counter()
    seconds_of_one = 0.1
    async with running_fleet(layout=layout, model=path, script=script, num_blocks=160) as fleet:

        async def one(i: int) -> None:
            nonlocal seconds_of_one
            prompt = random_prompt(rng.choice([1, 9, 16, 40, 100, 200]), seed=i % 40)
            sampling = SamplingParams(max_tokens=rng.randrange(1, 24), ignore_eos=True, seed=i)
            start = asyncio.get_running_loop().time()
            patience = rng.uniform(0, 1.2 * seconds_of_one) if i % 3 == 0 else 60
            try:
                async with asyncio.timeout(patience):
                    got = await fleet.generate(prompt, sampling, request_id=f"r{i}")
            except TimeoutError:
                fates["cancelled"] += 1
                return
            fates["finished"] += 1
            seconds_of_one = 0.9 * seconds_of_one + 0.1 * (asyncio.get_running_loop().time() - start)
            assert len(got.tokens) == sampling.max_tokens
            if i % 10 == 1:
                assert_tokens_pass_oracle(model, prompt, got.tokens, sampling)

        waiting = iter(range(num_requests))

        async def client() -> None:
            for i in waiting:
                await one(i)

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(client())
        assert fates["cancelled"] > num_requests // 10
        assert fates["finished"] >= num_requests * 2 // 3
        await wait_until_engines_are_idle(fleet)
        await fleet.assert_nothing_leaks()
        # And it still serves.
        got = await fleet.generate(random_prompt(50, seed=1), SamplingParams(max_tokens=5, ignore_eos=True))
        assert len(got.tokens) == 5


@pytest.mark.parametrize("seed", range(8))
def test_nothing_leaks_at_any_moment_of_virtual_time(seed: int) -> None:
    async def story() -> None:
        rng = Random(seed)
        layout = SimulatedRunner(Simulation()).layout
        script = rng.choice(["disaggregate", "balanced", "round_robin"])
        async with running_fleet(
            layout=layout, script=script, hub=SimHub(seed), clock=VirtualClock(), seed=seed, num_blocks=40
        ) as fleet:

            async def one(i: int) -> None:
                await asyncio.sleep(rng.uniform(0, 0.5))
                prompt = [i % 5, *range(rng.choice([1, 15, 16, 33, 120]))]
                sampling = SamplingParams(max_tokens=rng.randrange(1, 30), ignore_eos=True)
                try:
                    async with asyncio.timeout(rng.choice([rng.uniform(0, 0.3), 100.0])):
                        got = await fleet.generate(prompt, sampling, request_id=f"r{i}")
                except TimeoutError:
                    return
                assert got.tokens == simulated_tokens(prompt, sampling.max_tokens, sampling=sampling)

            async with asyncio.TaskGroup() as group:
                for i in range(60):
                    group.create_task(one(i))
            await wait_until_engines_are_idle(fleet)
            await fleet.assert_nothing_leaks()

    run_virtual(story)
