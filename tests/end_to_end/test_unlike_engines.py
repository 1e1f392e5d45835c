"""One fleet whose engines keep KV in blocks of different sizes and in different dtypes: hand-offs all the same."""

from collections.abc import Callable

import pytest
from fleet import running_fleet
from msgspec.structs import replace
from oracle import assert_tokens_pass_oracle
from tiny_models import generate_tokens, random_prompt

from callboard.actors.protocol import SamplingParams

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
BFLOAT16_TOLERANCE = 0.3
"""What rounding to 8 bits costs a token here is below 0.1; a token from elsewhere lies 1.5 and more below the best."""


@pytest.mark.parametrize(
    ("sizes", "script", "options"), [((8, 16), "disaggregate", {}), ((16, 5), "balanced", {"ratio": 0.4})]
)
async def test_engines_with_blocks_of_different_sizes_equal_generate(
    sizes: tuple[int, int], script: str, options: dict[str, float], tiny: Callable
) -> None:
    path, layout, model = tiny("llama3")
    layouts = {name: replace(layout, block_size=size) for name, size in zip(("p", "d"), sizes, strict=True)}
    async with running_fleet(layout=layout, model=path, layouts=layouts, script=script, options=options) as fleet:
        for length in (7, 40, 64):
            prompt = random_prompt(length, seed=length)
            expected = generate_tokens(model, prompt, 12)
            assert (await fleet.generate(prompt, GREEDY)).tokens == expected, f"{length} tokens"
            assert (await fleet.generate(prompt, GREEDY)).tokens == expected, f"{length} tokens, repeated"
        sent = [call.num_bytes for call in await fleet.sub_requests() if call.verb == "remote_send"]
        assert sum(sent) > 0
        await fleet.assert_nothing_leaks()


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
async def test_engines_of_different_dtypes_pass_the_oracle(dtypes: tuple[str, str], tiny: Callable) -> None:
    path, layout, model = tiny("llama3")
    layouts = {
        name: replace(layout, block_size=size, dtype=dtype)
        for name, size, dtype in zip(("p", "d"), (8, 16), dtypes, strict=True)
    }
    async with running_fleet(layout=layout, model=path, layouts=layouts) as fleet:
        for length in (7, 40):
            prompt = random_prompt(length, seed=length)
            for _ in range(2):
                got = await fleet.generate(prompt, GREEDY)
                assert len(got.tokens) == 12
                assert_tokens_pass_oracle(model, prompt, got.tokens, tolerance=BFLOAT16_TOLERANCE)
        sent = [call.num_bytes for call in await fleet.sub_requests() if call.verb == "remote_send"]
        assert sent[:2] == [7 * layouts["d"].token_bytes] * 2
        await fleet.assert_nothing_leaks()
