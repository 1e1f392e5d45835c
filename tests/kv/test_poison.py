"""Poison in free blocks: who reads one gets nonsense, and who writes one is found out."""

import pytest

from callboard.kv.block_pool import BlockPool
from callboard.kv.layout import KvLayout
from callboard.kv.page_store import PageStore
from callboard.kv.poison import BYTE, Poison

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=2, block_size=4)


@pytest.fixture
def store() -> PageStore:
    return PageStore.in_process(LAYOUT, 4)


@pytest.fixture
def pool(store: PageStore) -> BlockPool:
    pool = BlockPool(4)
    pool.watch = Poison(store)
    return pool


def pages(store: PageStore, block: int) -> list[bytes]:
    return [bytes(store.page(layer, half, block)) for layer in (0, 1) for half in (0, 1)]


def test_a_block_is_nonsense_when_it_is_lent_whatever_it_held_before(pool: BlockPool, store: PageStore) -> None:
    blocks = pool.allocate(4)
    assert all(set(page) == {BYTE} for block in blocks for page in pages(store, block))
    store.view[:] = bytes(len(store.view))
    pool.retain(blocks[:1])
    pool.release(blocks)
    assert [set(pages(store, block)[0]) for block in blocks] == [{0}, {BYTE}, {BYTE}, {BYTE}]
    assert set(pages(store, pool.allocate(1)[0])[3]) == {BYTE}
    assert pool.check_integrity() == []


@pytest.mark.parametrize(("layer", "half", "slot"), [(0, 0, 0), (1, 1, 3)])
def test_a_write_into_a_free_block_is_a_problem(
    pool: BlockPool, store: PageStore, layer: int, half: int, slot: int
) -> None:
    (block, *_) = pool.allocate(2)
    store.slot(layer, half, block * 4 + slot)[0] = 1
    assert pool.check_integrity() == []
    pool.release((block,))
    store.slot(layer, half, block * 4 + slot)[-1] = 1
    assert pool.check_integrity() == [f"block {block} was written while it was free"]
    assert set(pages(store, pool.allocate(1)[0])[0]) == {BYTE}


def test_what_is_lent_again_after_such_a_write_is_whole(pool: BlockPool, store: PageStore) -> None:
    store.slot(0, 1, 2)[:] = bytes(LAYOUT.slot_bytes)
    (block,) = pool.allocate(1)
    assert set(pages(store, block)[1]) == {BYTE}
    assert pool.check_integrity() == ["block 0 was written while it was free"]
