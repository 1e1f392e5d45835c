"""Every architecture through every path: one engine, disaggregated, balanced, prefix hits, batches, preemption.

A single unbatched request gives the very tokens of transformers' generate(); whatever shares a step with others passes
the oracle (tests/oracle.py).
"""

from collections.abc import Callable
from functools import cache
from random import Random

import pytest
from fleet import at_once, running_fleet
from oracle import assert_tokens_pass_oracle
from tiny_models import NAMES, generate_tokens, random_prompt, tiny_model

from callboard.actors.protocol import SamplingParams

NUM_NEW = 12
LENGTHS = (1, 5, 16, 17, 40, 64)
GREEDY = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True)


@cache
def expected_tokens(name: str, length: int, seed: int) -> tuple[list[int], list[int]]:
    """Return a prompt, and what transformers makes of it: the same for every path."""
    prompt = random_prompt(length, seed=seed)
    return prompt, generate_tokens(tiny_model(name), prompt, NUM_NEW)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("script", "ratio"),
    [
        ("round_robin", None),
        ("disaggregate", None),
        ("balanced", 0.05),
        ("balanced", 0.3),
        ("balanced", 0.5),
        ("balanced", 0.95),
    ],
)
async def test_single_requests_equal_generate(name: str, script: str, ratio: float | None, tiny: Callable) -> None:
    path, layout, _ = tiny(name)
    engines = ("e",) if script == "round_robin" else ("p", "d")
    options = {} if ratio is None else {"ratio": ratio}
    async with running_fleet(layout=layout, model=path, engines=engines, script=script, options=options) as fleet:
        for i, length in enumerate(LENGTHS):
            prompt, expected = expected_tokens(name, length, i)
            got = await fleet.generate(prompt, GREEDY)
            assert got.tokens == expected, f"{length} tokens"
            assert got.finish_reason == "length"
            again = await fleet.generate(prompt, GREEDY)
            assert again.tokens == expected, f"{length} tokens, repeated"
        await fleet.assert_nothing_leaks()


@pytest.mark.parametrize("name", NAMES)
async def test_prompts_that_share_a_prefix_equal_generate(name: str, tiny: Callable) -> None:
    path, layout, model = tiny(name)
    shared = random_prompt(37, seed=99)
    async with running_fleet(layout=layout, model=path) as fleet:
        for i in range(4):
            prompt = shared + random_prompt(3 + 7 * i, seed=i)
            got = await fleet.generate(prompt, GREEDY)
            assert got.tokens == generate_tokens(model, prompt, NUM_NEW)
            assert got.usage is not None
            assert (got.usage.num_cached_tokens > 0) or i == 0
        await fleet.assert_nothing_leaks()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("script", ["round_robin", "disaggregate", "balanced"])
async def test_mixed_requests_at_once_pass_the_oracle(name: str, script: str, tiny: Callable) -> None:
    path, layout, model = tiny(name)
    rng = Random(name)
    work = [
        (
            random_prompt(rng.randrange(1, 150), seed=i),
            SamplingParams(
                max_tokens=rng.randrange(1, 20),
                temperature=rng.choice([0.0, 0.0, 0.7, 1.0]),
                top_p=rng.choice([1.0, 0.9]),
                top_k=rng.choice([None, 20]),
                seed=i,
                ignore_eos=True,
            ),
        )
        for i in range(16)
    ]
    async with running_fleet(layout=layout, model=path, script=script, max_num_batched_tokens=48) as fleet:
        results = await at_once(fleet.generate, work)
        for (prompt, sampling), got in zip(work, results, strict=True):
            assert len(got.tokens) == sampling.max_tokens
            assert_tokens_pass_oracle(model, prompt, got.tokens, sampling)
        await fleet.assert_nothing_leaks()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("script", ["round_robin", "disaggregate", "balanced"])
async def test_a_pool_too_small_for_all_preempts_and_the_oracle_holds(name: str, script: str, tiny: Callable) -> None:
    path, layout, model = tiny(name)
    work = [
        (random_prompt(20 + 3 * i, seed=i), SamplingParams(max_tokens=40, ignore_eos=True, seed=i)) for i in range(8)
    ]
    engines = ("e",) if script == "round_robin" else ("p", "d")
    fleet_of = running_fleet(layout=layout, model=path, script=script, engines=engines, num_blocks=14)
    async with fleet_of as fleet:
        results = await at_once(fleet.generate, work)
        for (prompt, sampling), got in zip(work, results, strict=True):
            assert len(got.tokens) == 40
            assert_tokens_pass_oracle(model, prompt, got.tokens, sampling)
        assert sum(got.usage.num_preemptions for got in results if got.usage) > 0
        await fleet.assert_nothing_leaks()


async def test_an_end_of_sequence_token_ends_the_sequence(tiny: Callable) -> None:
    path, layout, model = tiny("llama3")
    async with running_fleet(layout=layout, model=path) as fleet:
        for seed in (78, *range(400)):  # One that ends, with the versions that are pinned.
            prompt = random_prompt(6, seed=seed)
            expected = generate_tokens(model, prompt, 16, ignore_eos=False)
            if len(expected) < 16:
                break
        else:
            pytest.fail("no prompt of this model ends by itself")
        got = await fleet.generate(prompt, SamplingParams(max_tokens=16))
        assert (got.tokens, got.finish_reason) == (expected, "stop")


async def test_a_prefix_hit_computes_only_the_rest(tiny: Callable) -> None:
    path, layout, model = tiny("llama3")
    shared = random_prompt(400, seed=1)
    first, second = shared + random_prompt(9, seed=2), shared + random_prompt(11, seed=3)
    async with running_fleet(layout=layout, model=path, engines=("e",), script="round_robin") as fleet:
        one, two = await fleet.generate(first, GREEDY), await fleet.generate(second, GREEDY)
        assert one.usage is not None
        assert two.usage is not None
        assert (one.usage.num_cached_tokens, one.usage.num_computed_tokens) == (0, 409)
        assert (two.usage.num_cached_tokens, two.usage.num_computed_tokens) == (400, 11)
        assert two.tokens == generate_tokens(model, second, NUM_NEW)
    async with running_fleet(layout=layout, model=path) as fleet:
        await fleet.generate(first, GREEDY, request_id="one")
        await fleet.generate(second, GREEDY, request_id="two")
        (sent,) = [call for call in await fleet.sub_requests("two") if call.verb == "remote_send"]
        assert sent.num_computed_tokens == 11
        assert sent.num_bytes == 11 * layout.token_bytes
