"""SmolLM2 on many prompts through every path, equal to generate()."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fleet import at_once, running_fleet
from oracle import assert_tokens_pass_oracle
from tiny_models import generate_tokens
from transformers import AutoTokenizer, PreTrainedModel

from callboard.actors.model_config import layout_of, read_model_config
from callboard.actors.protocol import SamplingParams

pytestmark = pytest.mark.smollm2
SCRIPTS = ("round_robin", "disaggregate", "balanced")
NUM_NEW = 5
GREEDY = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True)
TEXTS = (
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea, there lived",
    "1, 1, 2, 3, 5, 8,",
    "The three primary colours are",
    "A binary search tree is",
    "To be, or not to be,",
    "Roses are red,",
    "The quick brown fox",
    "In 1969, the first human",
    "Photosynthesis is the process by which",
    "Dear Sir or Madam,",
    "import numpy as np\n",
    "The opposite of hot is",
    "Two plus two equals",
    "The largest planet of the solar system is",
    "My favourite recipe begins with",
    "Breaking news:",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of",
)


@pytest.fixture(scope="module")
def prompts(smollm2_path: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def expected(smollm2: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    return [generate_tokens(smollm2, prompt, NUM_NEW) for prompt in prompts]


@pytest.mark.parametrize(
    ("script", "options", "every"),
    [("disaggregate", {}, 1), ("round_robin", {}, 4), ("balanced", {"ratio": 0.2}, 4), ("balanced", {"ratio": 0.6}, 4)],
)
async def test_prompts_equal_generate(
    script: str,
    options: dict[str, float],
    every: int,
    smollm2_path: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    layout = layout_of(read_model_config(smollm2_path))
    engines = ("e",) if script == "round_robin" else ("p", "d")
    async with running_fleet(
        layout=layout, model=smollm2_path, engines=engines, script=script, options=options, num_blocks=96
    ) as fleet:
        # The other scripts move less, or the same between the same engines: of them, some prompts, the longest too.
        for prompt, tokens in list(zip(prompts, expected, strict=True))[every - 1 :: every]:
            assert (await fleet.generate(prompt, GREEDY)).tokens == tokens
        again = await fleet.generate(prompts[-1], GREEDY)
        assert again.tokens == expected[-1]
        assert again.usage is not None
        assert again.usage.num_cached_tokens > 0
        await fleet.assert_nothing_leaks()


async def test_a_shared_thousand_tokens_is_computed_once(
    smollm2_path: Path, smollm2: PreTrainedModel, prompts: Callable
) -> None:
    layout = layout_of(read_model_config(smollm2_path))
    shared = [100 + (7 * i * i + 13 * i) % 40_000 for i in range(1000)]
    first, second = [*shared, *prompts[0]], [*shared, *prompts[1]]
    async with running_fleet(
        layout=layout, model=smollm2_path, engines=("e",), script="round_robin", num_blocks=160
    ) as fleet:
        one, two = await fleet.generate(first, GREEDY), await fleet.generate(second, GREEDY)
        assert one.usage is not None
        assert two.usage is not None
        assert one.usage.num_computed_tokens == len(first)
        # 1,000 tokens fill 62 blocks; the 8 after them share a block with what differs.
        assert two.usage.num_cached_tokens == 992
        assert two.usage.num_computed_tokens == len(second) - 992
        assert_tokens_pass_oracle(smollm2, second, two.tokens, GREEDY)


@pytest.mark.parametrize(
    ("script", "num_requests", "num_blocks", "max_tokens"),
    [
        *(pytest.param(script, 16, 96, 8, id=f"small budget, {script}") for script in SCRIPTS),
        *(pytest.param(script, 6, 6, 14, id=f"small pool, {script}") for script in ("round_robin", "balanced")),
    ],
)
async def test_a_small_budget_or_a_small_pool_passes_the_oracle(
    script: str,
    num_requests: int,
    num_blocks: int,
    max_tokens: int,
    smollm2_path: Path,
    smollm2: PreTrainedModel,
    prompts: list[list[int]],
) -> None:
    layout = layout_of(read_model_config(smollm2_path))
    engines = ("e",) if script == "round_robin" else ("p", "d")
    greedy = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    sampled = SamplingParams(max_tokens=max_tokens, temperature=0.8, top_p=0.95, seed=3, ignore_eos=True)
    work = [(prompt, sampled if i % 2 else greedy) for i, prompt in enumerate(prompts[-num_requests:])]
    async with running_fleet(
        layout=layout,
        model=smollm2_path,
        engines=engines,
        script=script,
        num_blocks=num_blocks,
        max_num_batched_tokens=max(len(prompt) for prompt, _ in work) - 1,
    ) as fleet:
        results = await at_once(fleet.generate, work)
        for (prompt, sampling), got in zip(work, results, strict=True):
            assert len(got.tokens) == max_tokens
            assert_tokens_pass_oracle(smollm2, prompt, got.tokens, sampling)
        num_preemptions = sum(got.usage.num_preemptions for got in results if got.usage)
        assert (num_preemptions > 0) == (num_requests == 6)
        await fleet.assert_nothing_leaks()
