"""A pool's block as one run of bytes, and back: ``[num_layers, 2, block_size, num_kv_heads, head_dim]``."""

from collections.abc import Iterator

from callboard.kv.layout import SlotRun
from callboard.kv.packing import pack, unpack
from callboard.kv.page_store import PIECE_BYTES, PageStore


def copy_out(store: PageStore, block: int, out: bytearray) -> Iterator[int]:
    """Copy a block into ``out``, in pieces of some layers; yields the bytes copied. Exhaust it."""
    layout, run = store.layout, _run(store, block)
    layer_bytes = layout.block_bytes // layout.num_layers
    for layers in _pieces(store):
        with memoryview(out) as whole, whole[layers.start * layer_bytes :] as piece:
            yield pack(store, run, layers, piece, wire_dtype=layout.dtype)


def copy_in(store: PageStore, block: int, data: memoryview) -> None:
    """Copy a block's bytes into its place in the pool."""
    unpack(store, _run(store, block), range(store.layout.num_layers), data, wire_dtype=store.layout.dtype)


def _run(store: PageStore, block: int) -> tuple[SlotRun, ...]:
    return (SlotRun(block * store.layout.block_size, store.layout.block_size),)


def _pieces(store: PageStore) -> Iterator[range]:
    layout = store.layout
    step = max(1, PIECE_BYTES * layout.num_layers // layout.block_bytes)
    for begin in range(0, layout.num_layers, step):
        yield range(begin, min(layout.num_layers, begin + step))
