import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callboard.kv.layout import KvLayout
from callboard.kv.page_store import PageStore, copy_slots
from callboard.kv.slots import SlotCopy, pair_runs, slot_runs

LAYOUT = KvLayout(num_layers=3, num_kv_heads=1, head_dim=2, block_size=4)


def test_the_bytes_lie_as_the_layout_says():
    store = PageStore.in_process(LAYOUT, 2)
    assert len(store.view) == 3 * 2 * 2 * 4 * 8
    assert store.offset(2, 1, 5) == ((2 * 2 + 1) * 8 + 5) * 8


def noisy(num_blocks, seed):
    store = PageStore.in_process(LAYOUT, num_blocks)
    store.view[:] = random.Random(seed).randbytes(len(store.view))
    return store


@settings(deadline=None)
@given(
    st.permutations(range(5)),
    st.permutations(range(7)),
    st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted),
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(sorted),
    st.integers(1, 100),
)
def test_exactly_the_named_slots_of_the_named_layers_are_copied(here, there, tokens, layers, piece_bytes):
    source, target, before = noisy(5, 1), noisy(7, 2), noisy(7, 2)
    begin, end = tokens
    copies = pair_runs(slot_runs(here, begin, end, 4), slot_runs(there, begin, end, 4))
    moved = list(copy_slots(source, target, copies, range(*layers), piece_bytes=piece_bytes))
    assert sum(moved) == (end - begin) * (layers[1] - layers[0]) * 2 * LAYOUT.slot_bytes
    assert all(size <= piece_bytes for size in moved)
    expected = {copy.target + i: copy.source + i for copy in copies for i in range(copy.count)}
    for layer in range(3):
        for half in (0, 1):
            for slot in range(target.num_slots):
                is_copied = slot in expected and layer in range(*layers)
                wanted = source.slot(layer, half, expected[slot]) if is_copied else before.slot(layer, half, slot)
                assert target.slot(layer, half, slot) == wanted


def test_two_mappings_of_a_memfd_show_the_same_bytes():
    owner = PageStore.create(LAYOUT, 2)
    other = PageStore.map(os.dup(owner.fd), LAYOUT, 2)
    owner.slot(1, 0, 3)[:] = b"12345678"
    assert other.slot(1, 0, 3) == b"12345678"
    owner.close()
    assert other.slot(1, 0, 3) == b"12345678"
    other.close()
    other.close()


def test_an_inherited_fd_grows_to_the_pool_and_a_foreign_one_does_not():
    with pytest.raises(ValueError, match="takes 384 bytes"):
        PageStore.map(os.memfd_create("small"), LAYOUT, 2)
    store = PageStore.adopt(os.memfd_create("small"), LAYOUT, 2)
    assert len(store.view) == 384
    store.close()


def test_a_long_run_is_copied_in_pieces():
    source, target = noisy(64, 1), noisy(64, 2)
    pieces = list(copy_slots(source, target, [SlotCopy(0, 0, 256)], range(3), piece_bytes=1000))
    assert pieces[:-1] == [1000] * (len(pieces) - 1)
    assert source.view == target.view


def test_a_pool_can_be_closed_between_two_pieces_of_a_copy():
    target = PageStore.create(LAYOUT, 7)
    pieces = copy_slots(noisy(5, 1), target, [SlotCopy(0, 0, 20)], range(3), piece_bytes=48)
    assert next(pieces) == 48
    target.close()
    assert target.is_closed
