"""Strategies that choose, over real tiny engines: whatever they choose, the tokens are the model's.

Three engines for each script, of one architecture with grouped heads; what differs between architectures is what one
engine computes, and test_oracle.py has that.
"""

import asyncio
from collections.abc import Callable
from random import Random

import pytest
from fleet import Fleet, at_once, running_fleet
from oracle import assert_tokens_pass_oracle
from tiny_models import generate_tokens, random_prompt

from callboard.actors.protocol import Probe, SamplingParams
from callboard.kv.tokens import pack_tokens

NUM_NEW = 8
GREEDY = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True)


def is_clean(fleet: Fleet) -> bool:
    router = fleet.actors["main"]
    return not any(router.loads.num_own(name) for name in fleet.actors)


@pytest.mark.parametrize("script", ["least_loaded", "prefix_aware", "adaptive", "migrate", "chain"])
async def test_what_a_strategy_chooses_changes_no_token(script: str, tiny: Callable) -> None:
    path, layout, model = tiny("llama3")
    rng = Random(script)
    shared = random_prompt(64, seed=7)
    options = {"min_range": 16} if script == "chain" else {}
    fleet_of = running_fleet(layout=layout, model=path, engines=("e0", "e1", "e2"), script=script, options=options)
    async with fleet_of as fleet:
        for length in (1, 16, 17, 90):  # Alone, and again from the caches: the very tokens.
            prompt = random_prompt(length, seed=length)
            expected = generate_tokens(model, prompt, NUM_NEW)
            for _ in range(2):
                assert (await fleet.generate(prompt, GREEDY)).tokens == expected, f"{length} tokens"
        work = [
            (
                (shared if i % 2 else []) + random_prompt(rng.randrange(1, 120), seed=100 + i),
                SamplingParams(max_tokens=rng.randrange(1, 16), temperature=rng.choice([0.0, 0.8]), seed=i),
            )
            for i in range(12)
        ]
        for (prompt, sampling), got in zip(work, await at_once(fleet.generate, work), strict=True):
            assert_tokens_pass_oracle(model, prompt, got.tokens, sampling)
        await fleet.assert_nothing_leaks()
        assert is_clean(fleet)


@pytest.mark.parametrize("script", ["adaptive", "migrate", "chain", "prefix_aware"])
async def test_an_answer_goes_on_elsewhere_with_the_same_tokens(script: str, tiny: Callable) -> None:
    path, layout, model = tiny("llama3")
    prompt = random_prompt(80, seed=3)
    sampling = SamplingParams(max_tokens=24, ignore_eos=True)
    options = {"min_range": 16} if script == "chain" else {}
    fleet_of = running_fleet(layout=layout, model=path, engines=("e0", "e1", "e2"), script=script, options=options)
    async with fleet_of as fleet:
        answer = asyncio.ensure_future(fleet.generate(prompt, sampling, request_id="r"))
        busy: list[str] = []
        while not busy:  # Until somebody has generated some of it.
            await asyncio.sleep(0.001)
            busy = [n for n in ("e0", "e1", "e2") if fleet.actors[n].scheduler.counts.num_generated_tokens >= 3]
        assert not answer.done()
        await fleet.nodes[busy[0]].stop()
        assert (await answer).tokens == generate_tokens(model, prompt, 24)
        served = {call.actor for call in await fleet.sub_requests("r") if call.verb == "start_generate"}
        assert len(served) == 2


async def test_a_hot_prefix_that_was_copied_gives_the_same_tokens(tiny: Callable) -> None:
    path, layout, model = tiny("llama3")
    shared = random_prompt(128, seed=1)
    async with running_fleet(layout=layout, model=path, engines=("e0", "e1"), script="migrate") as fleet:
        for number in range(20):
            await fleet.generate([*shared, number], SamplingParams(max_tokens=1))
        async with asyncio.timeout(20):
            while min([await fleet_cached(fleet, name, shared) for name in ("e0", "e1")]) < 128:
                await asyncio.sleep(0.05)
        prompts = [[*shared, 30 + number] for number in range(8)]
        results = await at_once(fleet.generate, [(prompt, GREEDY) for prompt in prompts])
        for prompt, got in zip(prompts, results, strict=True):
            assert_tokens_pass_oracle(model, prompt, got.tokens, GREEDY)
            assert got.usage is not None
            assert got.usage.num_cached_tokens == 128
        assert all(fleet.actors[n].scheduler.counts.num_generated_tokens > 8 for n in ("e0", "e1"))
        await fleet.assert_nothing_leaks()


async def fleet_cached(fleet: Fleet, engine: str, prompt: list[int]) -> int:
    return (await fleet.managers[f"kv-{engine}"].ask(Probe(pack_tokens(prompt)))).num_cached_tokens
