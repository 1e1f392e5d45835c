"""The workloads: how long prompts and outputs are, when requests arrive, and which tokens prompts are of.

Arrivals are a Poisson process and do not wait for answers. All strategies of a round get the same arrivals and lengths,
so that they can be compared request by request, and each gets tokens of its own, so that nothing is in a cache by
accident. Where prompts share prefixes on purpose, the prefixes are new in each block, too.
"""

import math
import random
from collections.abc import Sequence

import msgspec

from callboard.kv.tokens import pack_tokens

FIRST_TOKEN = 3
"""Ids below are special."""


COMMON = ("one", "round_robin", "least_loaded", "disaggregate", "balanced-30", "adaptive")


class Mix(msgspec.Struct, frozen=True):
    """Prompt and output lengths, in tokens: uniform within ``spread`` of their means."""

    name: str
    num_prompt: int
    num_output: int
    spread: float = 0.25
    num_prefixes: int = 0
    """Prompts begin with one of so many prefixes of ``num_prefix`` tokens, the n-th 1/n times as often as the first."""
    num_prefix: int = 0
    only: tuple[str, ...] = COMMON
    """Names the strategies that are compared on it."""
    utilisations: tuple[float, ...] = (0.6, 0.75, 0.9)
    """The rates, as shares of what data parallelism can do at most."""
    slo_ttft: float = 5.0
    slo_tpot: float = 3.0
    """The objective, in times of what a request takes alone on one idle engine."""


MIXES = (
    Mix("long in, short out (30:1)", 480, 16, only=(*COMMON, "balanced-10")),
    Mix("short in, long out (1:1)", 32, 32),
    Mix("short in, short out (4:1)", 32, 8),
    Mix("long in, long out (10:1)", 320, 32),
    Mix(
        "shared prefixes",
        num_prompt=432,
        num_output=16,
        num_prefixes=24,
        num_prefix=384,
        only=("least_loaded", "disaggregate", "adaptive", "prefix_aware", "migrate"),
        utilisations=(0.75,),
    ),
    Mix(
        "very long in (96:1)",
        num_prompt=960,
        num_output=10,
        only=("least_loaded", "disaggregate", "balanced-30", "adaptive", "chain"),
        utilisations=(0.75,),
    ),
)
"""The first is like the original's: 3000 tokens in, 100 out."""


class Call(msgspec.Struct, frozen=True, array_like=True):
    """One request: when it arrives, how much is asked, and which prefix its prompt begins with."""

    at_s: float
    num_prompt: int
    num_output: int
    prefix: int | None = None


def draw_calls(mix: Mix, rate: float, count: int, seed: int) -> list[Call]:
    """Return ``count`` requests at ``rate`` a second; all at once for an infinite rate."""
    rng = random.Random(f"{mix.name}/{seed}")
    calls, at_s = [], 0.0
    weights = [1 / (1 + index) for index in range(mix.num_prefixes)]
    for _ in range(count):
        # The lengths are drawn before the gap, and rates only stretch it: a seed is the same work at every rate.
        num_prompt, num_output = (_length(rng, mean, mix.spread) for mean in (mix.num_prompt, mix.num_output))
        prefix = rng.choices(range(mix.num_prefixes), weights)[0] if mix.num_prefixes else None
        gap = rng.expovariate(1.0)
        at_s += 0.0 if math.isinf(rate) else gap / rate
        calls.append(Call(at_s, max(num_prompt, mix.num_prefix + 1), num_output, prefix))
    return calls


def draw_prompts(calls: Sequence[Call], num_prefix: int, vocab_size: int, seed: str) -> list[bytes]:
    """Return a prompt of random tokens for each call; those of one prefix begin with the same ``num_prefix``."""
    rng = random.Random(seed)
    prefixes: dict[int, list[int]] = {}
    prompts = []
    for call in calls:
        begin: list[int] = []
        if call.prefix is not None:
            begin = prefixes.setdefault(call.prefix, [])
            if not begin:
                begin += _tokens(rng, num_prefix, vocab_size)
        prompts.append(pack_tokens([*begin, *_tokens(rng, call.num_prompt - len(begin), vocab_size)]))
    return prompts


def _tokens(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    return rng.choices(range(FIRST_TOKEN, vocab_size), k=count)


def _length(rng: random.Random, mean: int, spread: float) -> int:
    return max(2, round(rng.uniform(1 - spread, 1 + spread) * mean))
