import pytest
from hypothesis import given
from hypothesis import strategies as st

from callboard.kv.block_pool import BlockPool
from callboard.kv.layout import OutOfBlocks


def test_fresh_blocks_are_adjacent():
    assert BlockPool(8).allocate(3) == [0, 1, 2]


def test_a_shortage_says_how_short_and_changes_nothing():
    pool = BlockPool(4)
    pool.allocate(3)
    with pytest.raises(OutOfBlocks) as refusal:
        pool.allocate(2)
    assert (refusal.value.needed, refusal.value.free) == (2, 1)
    assert pool.num_free == 1


def test_a_retained_block_survives_its_first_release():
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.retain([block])
    pool.release([block])
    assert pool.num_free == 0
    pool.release([block])
    assert pool.num_free == 1


def test_released_blocks_come_back_in_their_order():
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    pool.release(blocks)
    assert pool.allocate(4) == blocks


@given(st.lists(st.tuples(st.sampled_from(["allocate", "retain", "release"]), st.integers(0, 6)), max_size=60))
def test_no_block_is_lent_twice_whatever_happens(steps):
    pool, holds = BlockPool(6), []
    for action, number in steps:
        if action == "allocate" and number <= pool.num_free:
            blocks = pool.allocate(number)
            assert not set(blocks) & set(holds)
            holds += blocks
        elif action == "retain" and holds:
            block = holds[number % len(holds)]
            pool.retain([block])
            holds.append(block)
        elif action == "release" and holds:
            pool.release([holds.pop(number % len(holds))])
        assert pool.check_integrity() == []
        assert pool.num_free == 6 - len(set(holds))
