"""Heads between degrees of tensor parallelism: each goes where it belongs, once, and shards that have it take turns."""

from collections import Counter

import pytest
import torch

from callboard.kernels.pages import SlotTable, copy_pages
from callboard.kernels.shards import head_copies, heads_of


def degrees(num_kv_heads: int) -> list[int]:
    return [
        degree for degree in range(1, 4 * num_kv_heads + 1) if num_kv_heads % degree == 0 or degree % num_kv_heads == 0
    ]


CASES = [(heads, a, b) for heads in (1, 2, 3, 8, 12) for a in degrees(heads) for b in degrees(heads)]


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 8, 12])
def test_shards_have_every_head_equally_often(num_kv_heads: int) -> None:
    for degree in degrees(num_kv_heads):
        had = Counter(head for shard in range(degree) for head in heads_of(shard, degree, num_kv_heads))
        assert had == dict.fromkeys(range(num_kv_heads), max(1, degree // num_kv_heads))


def test_every_head_of_every_target_is_filled_once_from_a_shard_that_has_it() -> None:
    for num_kv_heads, source_degree, target_degree in CASES:
        filled = Counter()
        for copy in head_copies(num_kv_heads, source_degree, target_degree):
            source = heads_of(copy.source_shard, source_degree, num_kv_heads)
            target = heads_of(copy.target_shard, target_degree, num_kv_heads)
            assert [source[head] for head in copy.source_heads] == [target[head] for head in copy.target_heads]
            filled.update((copy.target_shard, head) for head in copy.target_heads)
        wanted = [(shard, i) for shard in range(target_degree) for i in range(max(1, num_kv_heads // target_degree))]
        assert filled == dict.fromkeys(wanted, 1), (num_kv_heads, source_degree, target_degree)


def test_no_copy_could_be_joined_with_the_next() -> None:
    for num_kv_heads, source_degree, target_degree in CASES:
        copies = head_copies(num_kv_heads, source_degree, target_degree)
        ends = [(copy.source_shard, copy.target_shard, copy.target_heads.stop) for copy in copies]
        begins = [(copy.source_shard, copy.target_shard, copy.target_head) for copy in copies]
        assert not set(ends) & set(begins)


def test_shards_that_have_the_same_head_send_equally_often() -> None:
    copies = head_copies(2, source_degree=4, target_degree=8)
    assert Counter(copy.source_shard for copy in copies) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_one_shard_into_four_and_back() -> None:
    (first, *_) = head_copies(8, 1, 4)
    assert (first.source_heads, first.target_shard, first.target_heads) == (range(2), 0, range(2))
    assert [copy.target_heads for copy in head_copies(8, 4, 1)] == [range(2), range(2, 4), range(4, 6), range(6, 8)]


@pytest.mark.parametrize(("num_kv_heads", "degree"), [(8, 3), (3, 2), (2, 3), (8, 0), (0, 1)])
def test_a_degree_that_does_not_split_the_heads_is_refused(num_kv_heads: int, degree: int) -> None:
    with pytest.raises(ValueError, match="do not split"):
        head_copies(num_kv_heads, 1, degree)
    with pytest.raises(ValueError, match="do not split"):
        head_copies(num_kv_heads, degree, 1)


def test_a_shard_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no shard 4 of 4"):
        heads_of(4, 4, 8)


@pytest.mark.parametrize(("source_degree", "target_degree"), [(1, 4), (4, 1), (2, 6), (6, 2), (3, 4), (4, 3), (12, 24)])
def test_pools_of_one_degree_become_pools_of_another(source_degree: int, target_degree: int) -> None:
    """Whatever the degrees, the shards together hold the same KV afterwards, also in blocks of another size."""
    whole = torch.randn(2, 2, 6, 4, 12, 3)
    sources = split(whole, source_degree)
    expected = split(whole.flatten(2, 3)[:, :, torch.arange(23, -1, -1)].unflatten(2, (3, 8)), target_degree)
    targets = [torch.zeros_like(each) for each in expected]
    table, reversed_table = (
        SlotTable.of_blocks(range(6), 4, "cpu"),
        SlotTable.of_runs([(i, 1) for i in range(23, -1, -1)], "cpu"),
    )
    for copy in head_copies(12, source_degree, target_degree):
        copy_pages(
            sources[copy.source_shard],
            targets[copy.target_shard],
            table,
            reversed_table,
            layers=range(2),
            source_heads=copy.source_heads,
            target_heads=copy.target_heads,
        )
    for got, wanted in zip(targets, expected, strict=True):
        assert torch.equal(got, wanted)


def split(whole: torch.Tensor, degree: int) -> list[torch.Tensor]:
    heads = [heads_of(shard, degree, whole.shape[4]) for shard in range(degree)]
    return [whole[..., each.start : each.stop, :].contiguous() for each in heads]
