"""The shipped strategies over the production engine and KV manager, with a simulated model on the virtual clock."""

import asyncio
import random

import pytest
from fleet import running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation
from callboard.actors.protocol import SamplingParams
from callboard.bus import VirtualClock

LAYOUT = SimulatedRunner(Simulation()).layout
RANDOM = random.Random(3)
PROMPTS = [[RANDOM.randrange(1000) for _ in range(length)] for length in (1, 2, 15, 16, 17, 33, 100)]
SAMPLING = SamplingParams(max_tokens=8)


def fleet_of(*engines, script, **options):
    return running_fleet(
        layout=LAYOUT,
        engines=engines,
        script=script,
        options=options,
        clock=VirtualClock(),
    )


async def all_tokens(fleet):
    return [(await fleet.generate(prompt, SAMPLING)).tokens for prompt in PROMPTS]


async def expected():
    async with fleet_of("e", script="round_robin") as fleet:
        return await all_tokens(fleet)


STRATEGIES = [
    ("disaggregate", {}),
    *[("balanced", {"ratio": ratio}) for ratio in (0.0, 0.1, 0.37, 0.5, 0.8, 1.0)],
    ("prefix_aware", {}),
    ("migrate", {}),
    ("adaptive", {}),
    ("chain", {"min_range": 8}),
]


@pytest.mark.parametrize(("script", "options"), STRATEGIES)
async def test_every_strategy_gives_the_tokens_of_one_engine(script, options):
    wanted = await expected()
    async with fleet_of("p", "d", script=script, **options) as fleet:
        assert await all_tokens(fleet) == wanted
        assert await all_tokens(fleet) == wanted  # And again, from the prefix caches.
        await fleet.assert_nothing_leaks()


async def test_disaggregation_computes_the_prompt_on_the_prefill_engine():
    async with fleet_of("p", "d", script="disaggregate") as fleet:
        await fleet.generate(PROMPTS[-1], SAMPLING, request_id="r")
        spans = await fleet.sub_requests("r")
        assert [(s.verb, s.actor) for s in spans] == [
            ("prep_recv", "d"),
            ("remote_send", "p"),
            ("start_generate", "d"),
        ]
        send, generate = spans[1], spans[2]
        assert (send.num_computed_tokens, send.num_bytes) == (100, 100 * LAYOUT.token_bytes)
        assert (generate.num_computed_tokens, generate.num_reused_tokens) in ((1, 99), (1, 100), (0, 100))


@pytest.mark.parametrize("script", ["round_robin", "disaggregate", "balanced", "adaptive", "migrate", "chain"])
async def test_requests_cancelled_at_any_moment_leak_nothing(script):
    rng = random.Random(5)
    async with fleet_of("p", "d", script=script) as fleet:

        async def client(number):
            prompt = [rng.randrange(1000) for _ in range(rng.randrange(1, 120))]
            await fleet.generate(prompt, SamplingParams(max_tokens=20))

        tasks = []
        for number in range(60):
            tasks.append(asyncio.ensure_future(client(number)))
            for _ in range(rng.randrange(40)):
                await asyncio.sleep(0)
            if rng.random() < 0.5:
                rng.choice(tasks).cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [r for r in results if isinstance(r, Exception)]
        await fleet.assert_nothing_leaks()
