import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callboard.kv.block_pool import BlockPool
from callboard.kv.prefix_cache import PrefixCache
from callboard.kv.tokens import pack_tokens

SIZE = 2


def make(num_blocks=8):
    pool = BlockPool(num_blocks)
    return pool, PrefixCache(pool, SIZE)


def fill(pool, cache, ids):
    """Cache the full blocks of ``ids`` as a sequence that has ended."""
    table = pool.allocate(-(-len(ids) // SIZE))
    cache.insert(pack_tokens(ids), table)
    cache.unpin(table)
    return table


def test_the_longest_run_of_full_blocks_is_matched():
    pool, cache = make()
    table = fill(pool, cache, [1, 2, 3, 4, 5])
    match = cache.match(pack_tokens([1, 2, 3, 4, 5, 6]))
    assert match.blocks == tuple(table[:2])
    assert match.num_tokens == 4
    assert cache.match(pack_tokens([1, 2, 3])).num_tokens == 2
    assert cache.match(pack_tokens([2, 3, 4])).num_tokens == 0


def test_a_partly_filled_tail_is_not_cached():
    pool, cache = make()
    fill(pool, cache, [1, 2, 3])
    assert len(cache) == 1
    assert pool.num_free == 7


def test_the_cache_keeps_its_own_block_and_the_duplicate_stays_private():
    pool, cache = make()
    (first,) = fill(pool, cache, [1, 2])
    second = pool.allocate(2)
    assert cache.insert(pack_tokens([1, 2, 3, 4]), second) == 1
    assert cache.match(pack_tokens([1, 2, 3, 4])).blocks == (first, second[1])
    cache.unpin(second)
    assert second[0] not in cache
    assert pool.num_free == 6


def test_a_block_cannot_be_cached_under_two_texts():
    pool, cache = make()
    table = pool.allocate(1)
    cache.insert(pack_tokens([1, 2]), table)
    with pytest.raises(ValueError, match="other tokens"):
        cache.insert(pack_tokens([3, 4]), table)
    assert cache.check_integrity() == []


def test_tails_are_evicted_before_their_prefix():
    pool, cache = make()
    table = fill(pool, cache, [1, 2, 3, 4, 5, 6])
    for depth in (2, 1, 0):
        assert cache.evict(1)
        assert table[depth] not in cache


def test_the_least_recently_used_leaf_goes_first():
    pool, cache = make()
    (old,), (new,) = fill(pool, cache, [1, 2]), fill(pool, cache, [3, 4])
    cache.pin((old,))
    cache.unpin((old,))
    assert cache.evict(1)
    assert old in cache
    assert new not in cache


def test_a_pinned_block_is_not_evicted():
    pool, cache = make()
    table = fill(pool, cache, [1, 2])
    cache.pin(table)
    assert not cache.evict(1)
    cache.unpin(table)
    assert cache.evict(1)


def test_a_block_held_twice_may_be_given_up_at_once():
    pool, cache = make()
    table = fill(pool, cache, [1, 2])
    cache.pin([*table, *table])
    cache.unpin([*table, *table])
    assert cache.num_idle == 1
    assert cache.check_integrity() == []


def test_eviction_takes_all_it_was_asked_for_or_nothing():
    pool, cache = make()
    fill(pool, cache, [1, 2])
    mine = pool.allocate(2)
    cache.insert(pack_tokens([1, 2, 3, 4]), mine)
    fill(pool, cache, [7, 8])
    # [1, 2] is idle, but lies above a block in use.
    assert cache.num_idle == 2
    assert not cache.evict(2)
    assert len(cache) == 3
    assert cache.check_integrity() == []
    assert cache.evict(1)


texts = st.lists(st.integers(0, 1), max_size=9)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["run", "end", "evict", "match"]), texts, st.integers(0, 9)), max_size=40))
def test_the_cache_answers_as_a_plain_table_does(steps):
    pool, cache = make(12)
    running = []
    for action, ids, number in steps:
        tokens = pack_tokens(ids)
        if action == "run":
            match = cache.match(tokens)
            cache.pin(match.blocks)
            needed = -(-len(ids) // SIZE) - len(match.blocks)
            if needed > pool.num_free and not cache.evict(needed - pool.num_free):
                cache.unpin(match.blocks)
                continue
            table = [*match.blocks, *pool.allocate(needed)]
            assert len(set(table)) == len(table)
            assert not set(table[len(match.blocks) :]) & {block for other in running for block in other}
            cache.insert(tokens, table)
            assert cache.match(tokens).num_tokens == len(ids) // SIZE * SIZE
            running.append(table)
        elif action == "end" and running:
            cache.unpin(running.pop(number % len(running)))
        elif action == "evict":
            free = pool.num_free
            gained = number if cache.evict(number) else 0
            assert pool.num_free == free + gained
        else:
            assert all(block in cache for block in cache.match(tokens).blocks)
        held = {block for table in running for block in table}
        assert all(pool.refs(block) > 0 for block in held)
        assert pool.check_integrity() + cache.check_integrity() == []
    for table in running:
        cache.unpin(table)
    assert cache.num_idle == len(cache)
    assert cache.evict(len(cache))
    assert pool.num_free == 12
