import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from callboard.kernels.paged_attention import paged_attention, paged_attention_reference

chunks = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=3)
decodes = st.lists(st.integers(0, 70), max_size=5)


def arguments(decodes, chunks, block_size, num_kv_heads, group, seed, *, num_unwritten=0, dtype=torch.float32):
    """A step of decodes (context before) and chunks (context before, queries) over scattered blocks."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [(before, 1) for before in decodes] + chunks
    needed = [-(-(before + new) // block_size) for before, new in sequences]
    blocks = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    tables = torch.zeros(len(sequences) + 1, max(needed) + 1, dtype=torch.int32)
    slots, query_start, context_lens = [], [0], []
    for i, (before, new) in enumerate(sequences):
        own = [blocks.pop() for _ in range(needed[i])]
        tables[i, : len(own)] = torch.tensor(own)
        slots += [own[p // block_size] * block_size + p % block_size for p in range(before, before + new)]
        query_start.append(query_start[-1] + new)
        context_lens.append(before + new)
    slots[:num_unwritten] = [-1] * len(slots[:num_unwritten])
    head_dim, total = 8, query_start[-1]
    pool = torch.randn(2, sum(needed) + 2, block_size, num_kv_heads, head_dim, generator=generator)
    return {
        "query": torch.randn(total, num_kv_heads * group, head_dim, generator=generator).to(dtype),
        "key": torch.randn(total, num_kv_heads, head_dim, generator=generator).to(dtype),
        "value": torch.randn(total, num_kv_heads, head_dim, generator=generator).to(dtype),
        "pool": pool.to(dtype),
        "slots": torch.tensor(slots),
        "block_tables": tables,
        "context_lens": torch.tensor(context_lens),
        "query_start": torch.tensor(query_start),
        "split": torch.tensor([len(decodes), len(sequences)]),
        "scale": 0.3,
    }


@settings(max_examples=60, deadline=None)
@given(
    decodes,
    chunks,
    st.sampled_from([1, 4, 16]),
    st.sampled_from([(1, 1), (2, 2), (3, 3), (1, 4)]),
    st.sampled_from([None, 1, 3, 16, 64]),
    st.integers(0, 3),
    st.integers(0, 1000),
)
def test_the_operator_equals_its_reference(decodes, chunks, block_size, heads, window, num_unwritten, seed):
    if not decodes and not chunks:
        chunks = [(0, 3)]
    step = arguments(decodes, chunks, block_size, *heads, seed, num_unwritten=num_unwritten)
    expected_pool = step["pool"].clone()
    expected = paged_attention_reference(**{**step, "pool": expected_pool}, window=window)
    actual = paged_attention(**step, window=window)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(step["pool"], expected_pool)


def on_the_host(step):
    """Return what a pool on a GPU comes with besides: the lengths on the CPU, and whether slots are left out."""
    lens = torch.zeros(2, len(step["query_start"]), dtype=torch.int64)
    lens[0, :-1], lens[1] = step["context_lens"], step["query_start"]
    num_unwritten = int((step["slots"] < 0).sum())
    return {"host_lens": lens, "split": torch.tensor([*step["split"].tolist(), num_unwritten])}


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("num_unwritten", [0, 2])
def test_lengths_on_the_host_change_nothing(window, num_unwritten):
    step = arguments([400, 3, 0, 17, 390, 5], [(5, 9), (0, 3)], 16, 2, 2, 0, num_unwritten=num_unwritten)
    expected_pool = step["pool"].clone()
    expected = paged_attention_reference(**{**step, "pool": expected_pool}, window=window)
    actual = paged_attention(**{**step, **on_the_host(step)}, window=window)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(step["pool"], expected_pool)


def test_chunks_are_cut_by_the_lengths_on_the_host_alone():
    # On a GPU, asking the other ones would wait for everything launched before.
    step = arguments([], [(5, 9), (0, 3), (40, 7)], 16, 2, 2, 0)
    expected = paged_attention_reference(**{**step, "pool": step["pool"].clone()})
    nothing = {"context_lens": torch.zeros(3, dtype=torch.int64), "query_start": torch.zeros(4, dtype=torch.int64)}
    actual = paged_attention(**{**step, **on_the_host(step), **nothing})
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def test_one_long_decode_among_short_ones_equals_the_reference():
    step = arguments([400, 3, 0, 17, 390, 5], [], 16, 2, 2, 0)
    expected = paged_attention_reference(**{**step, "pool": step["pool"].clone()})
    torch.testing.assert_close(paged_attention(**step), expected, atol=2e-5, rtol=2e-5)


def test_bfloat16_stays_close_to_the_reference():
    step = arguments([30, 3], [(5, 9)], 4, 2, 2, 0, dtype=torch.bfloat16)
    expected = paged_attention_reference(**{**step, "pool": step["pool"].clone()})
    torch.testing.assert_close(paged_attention(**step), expected, atol=3e-2, rtol=3e-2)


def test_the_operator_declares_what_it_mutates_and_has_a_fake():
    step = arguments([30, 3], [(5, 9)], 4, 2, 2, 0)
    torch.library.opcheck(
        paged_attention,
        tuple(step.values()),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_a_pool_of_another_shape_is_refused():
    step = arguments([3], [], 4, 2, 2, 0)
    with pytest.raises(ValueError, match="does not hold keys"):
        paged_attention(**{**step, "pool": step["pool"][:, :, :, :1].contiguous()})
