"""The simulated runner: its tokens show every kind of wrong KV, its layers and steps take their time."""

from collections.abc import Callable
from random import Random

import pytest

from callboard.actors.engine.simulated import LLAMA2_70B_ON_4_H100, SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.engine.step import Chunk, Draw, Step
from callboard.actors.protocol import SamplingParams
from callboard.bus import VirtualClock
from callboard.bus.testing import run_virtual
from callboard.kv.page_store import PageStore
from callboard.kv.poison import Poison
from callboard.kv.tokens import pack_tokens

NUM_BLOCKS = 24
BLOCK = 16
SAMPLING = SamplingParams(max_tokens=8)
PROMPT = [(7 * i + 3) % 1000 for i in range(3 * BLOCK + 5)]
TABLE = [5, 2, 11, 7]
RIGHT = simulated_tokens(PROMPT, 8)


class Pool:
    """A poisoned pool, and a runner over it that is driven chunk by chunk."""

    def __init__(self, simulation: Simulation | None = None, dtype: str = "float32") -> None:
        self.runner = SimulatedRunner(simulation or Simulation(), dtype=dtype)
        self.layout = self.runner.layout
        self.store = PageStore.in_process(self.layout, NUM_BLOCKS)
        Poison(self.store)
        self.runner.map_pool(self.store.view, NUM_BLOCKS)

    def compute(self, tokens: list[int], table: list[int], begin: int = 0, *, end: int | None = None) -> int:
        """Compute the KV of ``tokens[begin:end]``, and return what is sampled after it."""
        end = len(tokens) if end is None else end
        return self.step(chunk_of(tokens[:end], table, begin))[0]

    def step(self, *chunks: Chunk) -> list[int]:
        samples = self.runner.run(step_of(*chunks), lambda *layers: None).samples
        return [sample.token for sample in samples]

    def generate(self, prompt: list[int], table: list[int], num_tokens: int, *, num_cached: int) -> list[int]:
        """Compute what of the prompt is not cached, and decode."""
        tokens, begin = list(prompt), num_cached
        while len(tokens) < len(prompt) + num_tokens:
            sampled = self.compute(tokens, table, begin)
            begin = len(tokens)
            tokens.append(sampled)
        return tokens[len(prompt) :]

    def copy(self, source: int, target: int, *, halves: tuple[int, ...] = (0, 1), layers: range | None = None) -> None:
        """Copy a block's pages."""
        for layer in layers or range(self.layout.num_layers):
            for half in halves:
                self.store.page(layer, half, target)[:] = self.store.page(layer, half, source)


def chunk_of(tokens: list[int], table: list[int], begin: int, *, is_kv_only: bool = False) -> Chunk:
    draw = None if is_kv_only else Draw(SAMPLING, 0)
    part, blocks = pack_tokens(tokens[begin:]), pack_tokens(table)
    return Chunk("s", part, begin, begin, blocks, draw, is_kv_only)


def step_of(*chunks: Chunk) -> Step:
    sizes = [chunk.end - chunk.begin for chunk in chunks]
    return Step(chunks, sum(size == 1 for size in sizes), sum(sizes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(8))
def test_any_batching_over_any_blocks_gives_the_tokens_that_are_right(seed: int, dtype: str) -> None:
    rng = Random(seed)
    pool = Pool(Simulation(num_layers=rng.choice([1, 3, 4]), head_dim=rng.choice([4, 6, 8])), dtype)
    blocks = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    families = [[rng.randrange(1000) for _ in range(rng.randrange(1, 80))] for _ in range(3)]
    tables = [[blocks.pop() for _ in range(7)] for _ in families]
    tokens, computed = [list(prompt) for prompt in families], [0, 0, 0]
    while any(len(t) < len(prompt) + 6 for t, prompt in zip(tokens, families, strict=True)):
        members = rng.sample(range(3), rng.randrange(1, 4))
        ends = [min(len(tokens[i]), computed[i] + rng.randrange(1, 40)) for i in members]
        chunks = [chunk_of(tokens[i][:end], tables[i], computed[i]) for i, end in zip(members, ends, strict=True)]
        for i, end, token in zip(members, ends, pool.step(*chunks), strict=True):
            computed[i] = end
            if end == len(tokens[i]):
                tokens[i].append(token)
    for i, prompt in enumerate(families):
        expected = simulated_tokens(prompt, len(tokens[i]) - len(prompt), pool.runner.simulation)
        assert tokens[i][len(prompt) :] == expected


Plant = Callable[[Pool], None]


def stale_block_of_another_request(pool: Pool) -> None:
    pool.compute([1, *PROMPT[1:]], [0, 1, 2, 3], end=2 * BLOCK)
    pool.copy(1, TABLE[1])


def unwritten_block(pool: Pool) -> None:
    pool.copy(20, TABLE[1])


def zeroed_block(pool: Pool) -> None:
    for half in (0, 1):
        for layer in range(pool.layout.num_layers):
            pool.store.page(layer, half, TABLE[2])[:] = bytes(len(pool.store.page(layer, half, TABLE[2])))


def two_blocks_in_each_others_place(pool: Pool) -> None:
    pool.copy(TABLE[0], 20)
    pool.copy(TABLE[1], TABLE[0])
    pool.copy(20, TABLE[1])


def the_same_tokens_one_position_later(pool: Pool) -> None:
    slot = TABLE[1] * BLOCK
    for layer in range(pool.layout.num_layers):
        for half in (0, 1):
            for i in range(BLOCK - 1, 0, -1):
                pool.store.slot(layer, half, slot + i)[:] = pool.store.slot(layer, half, slot + i - 1)


def the_right_tokens_computed_at_other_positions(pool: Pool) -> None:
    pool.compute(PROMPT[BLOCK:], [20, 21, 22, 23], end=BLOCK)
    pool.copy(20, TABLE[1])


def layer_group(begin: int, end: int) -> Plant:
    return lambda pool: pool.copy(20, TABLE[1], layers=range(begin, end))


def only_keys(pool: Pool) -> None:
    pool.copy(20, TABLE[1], halves=(1,), layers=range(3, 4))


def half_a_page(pool: Pool) -> None:
    page, fresh = pool.store.page(2, 0, TABLE[1]), pool.store.page(2, 0, 20)
    page[len(page) // 2 :] = fresh[len(page) // 2 :]


def half_a_slot(pool: Pool) -> None:
    slot, fresh = pool.store.slot(2, 1, TABLE[1] * BLOCK + 3), pool.store.slot(2, 1, 20 * BLOCK)
    slot[len(slot) // 2 :] = fresh[len(slot) // 2 :]


def first_half_of_a_slot(pool: Pool) -> None:
    slot, fresh = pool.store.slot(0, 0, TABLE[1] * BLOCK + 3), pool.store.slot(0, 0, 20 * BLOCK)
    slot[: len(slot) // 2] = fresh[: len(slot) // 2]


def another_layers_pages(pool: Pool) -> None:
    pool.store.page(1, 0, TABLE[0])[:] = pool.store.page(2, 0, TABLE[0])


def keys_for_values(pool: Pool) -> None:
    pool.store.page(1, 0, TABLE[0])[:] = pool.store.page(1, 1, TABLE[0])


PLANTS = [
    stale_block_of_another_request,
    unwritten_block,
    zeroed_block,
    two_blocks_in_each_others_place,
    the_same_tokens_one_position_later,
    the_right_tokens_computed_at_other_positions,
    *(layer_group(i, i + 1) for i in range(4)),
    only_keys,
    half_a_page,
    half_a_slot,
    first_half_of_a_slot,
    another_layers_pages,
    keys_for_values,
]


@pytest.mark.parametrize("num_cached", [2 * BLOCK, 3 * BLOCK, len(PROMPT)])
@pytest.mark.parametrize("plant", [None, *PLANTS])
def test_wrong_kv_gives_wrong_tokens(plant: Plant | None, num_cached: int) -> None:
    if plant is zeroed_block and num_cached == 2 * BLOCK:
        num_cached = 3 * BLOCK  # What it spoils is written anew otherwise.
    pool = Pool()
    pool.compute(PROMPT, TABLE)
    if plant is not None:
        plant(pool)
    if num_cached == len(PROMPT):
        tokens = [*PROMPT, RIGHT[0]]
        got = [RIGHT[0], *pool.generate(tokens, TABLE, 7, num_cached=num_cached)]
    else:
        got = pool.generate(PROMPT, TABLE, 8, num_cached=num_cached)
    assert (got == RIGHT) is (plant is None)


def test_kv_computed_over_wrong_kv_is_wrong_itself() -> None:
    pages = []
    for is_spoilt in (False, True):
        pool = Pool()
        pool.compute(PROMPT, TABLE, end=2 * BLOCK)
        if is_spoilt:
            unwritten_block(pool)
        pool.step(chunk_of(PROMPT, TABLE, 2 * BLOCK, is_kv_only=True))
        pages.append([bytes(pool.store.page(layer, 0, TABLE[2])) for layer in range(4)])
    right, wrong = pages
    # The first layer's KV is of the token and its position alone, as in any transformer.
    assert right[0] == wrong[0]
    assert all(right[layer] != wrong[layer] for layer in (1, 2, 3))


def test_a_layers_kv_is_in_place_when_it_is_reported_and_not_before() -> None:
    pool = Pool(Simulation(seconds_per_prefill_token=0.1))
    step = step_of(chunk_of(PROMPT[:10], TABLE, 0, is_kv_only=True))
    clock = VirtualClock()
    seen: list[tuple[float, int, list[bool]]] = []

    def on_layers(begin: int, end: int) -> None:
        fresh = pool.store.page(0, 0, 20)
        written = [pool.store.page(layer, 1, TABLE[0]) != fresh for layer in range(4)]
        seen.append((round(clock.now(), 6), end, written))

    async def main() -> None:
        await pool.runner.run_timed(step, on_layers, clock.sleep)

    run_virtual(main)
    assert [(when, end) for when, end, _ in seen] == [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)]
    assert [sum(written) for *_, written in seen] == [1, 2, 3, 4]


# Llama-2-70B on four H100 (tensor parallel), medians of five runs in milliseconds: splitwise-sim, data/perf_model.csv
# (MIT). A prompt of so many tokens alone; so many sequences that decode, at 512 to 640 tokens each.
PREFILL_MS = {128: 49.1, 256: 51.0, 512: 59.6, 1024: 105.6, 2048: 200.7, 4096: 463.5, 8192: 953.6}
DECODE_MS = {1: 28.4, 2: 30.0, 4: 29.9, 8: 31.4, 16: 32.8, 32: 36.9, 64: 52.4}


@pytest.mark.parametrize(("num_tokens", "measured_ms"), PREFILL_MS.items())
def test_a_prefill_costs_what_was_measured(num_tokens: int, measured_ms: float) -> None:
    seconds = LLAMA2_70B_ON_4_H100.step_seconds(step_of(chunk_of([1] * num_tokens, TABLE, 0)))
    assert seconds * 1e3 == pytest.approx(measured_ms, rel=0.14 if num_tokens >= 512 else 0.23)


@pytest.mark.parametrize(("num_sequences", "measured_ms"), DECODE_MS.items())
def test_a_decode_costs_what_was_measured(num_sequences: int, measured_ms: float) -> None:
    chunk = chunk_of([1] * 576, TABLE, 575)
    seconds = LLAMA2_70B_ON_4_H100.step_seconds(step_of(*[chunk] * num_sequences))
    assert seconds * 1e3 == pytest.approx(measured_ms, rel=0.07)


def test_chunks_of_a_prompt_cost_as_much_attention_as_the_whole_of_it() -> None:
    costs = Simulation(seconds_per_attended_token=1.0)
    whole = costs.step_seconds(step_of(chunk_of([1] * 100, TABLE, 0)))
    parts = [chunk_of([1] * 60, TABLE, 0), chunk_of([1] * 100, TABLE, 60)]
    assert sum(costs.step_seconds(step_of(part)) for part in parts) == whole == 100 * 101 / 2
