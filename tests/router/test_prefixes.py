"""Which beginnings are hot, by the prompts that came: found, told at their rate, forgotten in time, and bounded."""

import random

from callboard.kv.tokens import pack_tokens
from callboard.router.known.prefixes import CHUNK, MEMORY_S, MOST_LEAVES, Prefixes


def prompt(*parts: int) -> bytes:
    """Return 64 tokens for each part, the same for the same number."""
    return b"".join(pack_tokens(random.Random(part).choices(range(1000), k=64)) for part in parts)


def hot(prefixes: Prefixes, rate: float, now: float, model: str = "m") -> list[tuple[bytes, float]]:
    return [(tokens, hits) for _, tokens, hits in prefixes.hot(model, min_hits_per_s=rate, now=now, most=8)]


def test_a_beginning_that_many_share_is_found_to_its_end():
    prefixes = Prefixes()
    for number in range(300):
        prefixes.note("m", prompt(1, 2, 1000 + number), number / 10)
    ((tokens, hits),) = hot(prefixes, 1.0, 30.0)
    assert tokens == prompt(1, 2)
    assert abs(hits - 10.0 * (1 - 2.718281828**-1)) < 0.3  # Ten a second, of which a third is still to be believed.


def test_of_one_that_continues_another_the_longer_is_told_where_it_is_hot_itself():
    prefixes = Prefixes()
    for number in range(100):
        prefixes.note("m", prompt(1, 2 if number % 10 else 3, 1000 + number), 0.0)
    assert [tokens for tokens, _ in hot(prefixes, 1.0, 0.0)] == [prompt(1, 2)]
    assert {tokens for tokens, _ in hot(prefixes, 0.3, 0.0)} == {prompt(1, 2), prompt(1, 3)}
    assert [tokens for tokens, _ in hot(prefixes, 3.1, 0.0)] == [prompt(1)]


def test_what_is_not_asked_for_any_more_cools_down():
    prefixes = Prefixes()
    for _ in range(60):
        prefixes.note("m", prompt(1), 0.0)
    assert [round(hits, 3) for _, hits in hot(prefixes, 0.1, 0.0)] == [2.0]
    assert hot(prefixes, 0.1, 4 * MEMORY_S) == []


def test_models_are_apart_and_a_short_prompt_has_no_prefix():
    prefixes = Prefixes()
    for _ in range(10):
        prefixes.note("m", prompt(1), 0.0)
        prefixes.note("n", prompt(2), 0.0)
        prefixes.note("m", prompt(3)[: CHUNK - 4], 0.0)
    assert [tokens for tokens, _ in hot(prefixes, 0.1, 0.0)] == [prompt(1)]
    assert len(hot(prefixes, 0.1, 0.0, model="")) == 2


def test_rates_are_those_of_a_plain_count_whatever_the_prompts():
    rng = random.Random(1)
    for _ in range(50):
        prefixes, seen = Prefixes(), []
        for _ in range(rng.randrange(1, 60)):
            parts = [rng.randrange(3) for _ in range(rng.randrange(1, 5))]
            seen.append(prompt(*parts)[: rng.choice([None, -CHUNK, -5])])
            prefixes.note("m", seen[-1], 0.0)
        for tokens, hits in hot(prefixes, 1e-9, 0.0):
            count = sum(each[: len(each) // CHUNK * CHUNK].startswith(tokens) for each in seen)
            assert abs(hits - count / MEMORY_S) < 1e-9
            assert len(tokens) % CHUNK == 0


def test_what_is_remembered_is_bounded_and_what_is_used_stays():
    prefixes = Prefixes()
    for number in range(3 * MOST_LEAVES):
        prefixes.note("m", prompt(1) + pack_tokens([number] * 64), 0.0)
        prefixes.note(f"model {number}", prompt(2), 0.0)
    assert len(prefixes) <= MOST_LEAVES
    assert prefixes.num_bytes <= (MOST_LEAVES + 1) * len(prompt(1, 2))
    assert [tokens for tokens, _ in hot(prefixes, 1.0, 0.0)] == [prompt(1)]


def test_all_is_forgotten_without_a_trace():
    prefixes = Prefixes()
    rng = random.Random(2)
    for _ in range(200):
        prefixes.note("m", prompt(*(rng.randrange(4) for _ in range(rng.randrange(1, 6)))), 0.0)
    while len(prefixes):
        prefixes._forget()
    assert prefixes.num_bytes == 0
    assert hot(prefixes, 0.0, 0.0) == []


def test_it_says_how_much_of_a_prompt_came_before():
    prefixes = Prefixes()
    assert prefixes.note("m", prompt(1, 2), 0.0) == 0
    assert prefixes.note("m", prompt(1, 3), 0.0) == 64
    assert prefixes.note("m", prompt(1, 3), 0.0) == 128
    assert prefixes.note("m", prompt(1)[:-CHUNK], 0.0) == 48
    assert prefixes.note("n", prompt(1), 0.0) == 0
    assert prefixes.note("m", prompt(1)[: CHUNK - 4], 0.0) == 0
