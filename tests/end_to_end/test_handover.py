"""Sequences of real models, handed over while they decode: every token is the best one after those before it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fleet import at_once, running_fleet
from oracle import assert_tokens_pass_oracle
from tiny_models import NAMES, random_prompt

from callboard.actors.protocol import SamplingParams

SCRIPTS = Path(__file__).parent.parent / "handover" / "scripts"
SAMPLED = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.8, top_p=0.9, seed=11)
PENALIZED = SamplingParams(max_tokens=30, ignore_eos=True, presence_penalty=0.5, frequency_penalty=0.3)


@pytest.mark.parametrize(("name", "is_shared"), [*((name, False) for name in NAMES), ("mistral", True)])
async def test_tokens_of_moved_sequences_pass_the_oracle(name: str, is_shared: bool, tiny: Callable) -> None:
    path, layout, model = tiny(name)
    lengths = (1, 15, 16, 17, 40)
    work = [
        (random_prompt(length, seed=i), (SamplingParams(max_tokens=30, ignore_eos=True), SAMPLED, PENALIZED)[i % 3])
        for i, length in enumerate(lengths)
    ]
    script = str(SCRIPTS / "to_and_fro.py")
    async with running_fleet(
        layout=layout, model=path, engines=("d1", "d2"), script=script, is_shared=is_shared
    ) as fleet:
        results = await at_once(fleet.generate, work)
        for (prompt, sampling), result in zip(work, results, strict=True):
            assert len(result.tokens) == sampling.max_tokens
            assert_tokens_pass_oracle(model, prompt, result.tokens, sampling)
        moves = [span for span in await fleet.sub_requests() if span.verb == "freeze" and not span.error]
        assert len(moves) >= 3 * len(work)
        await fleet.assert_nothing_leaks()
