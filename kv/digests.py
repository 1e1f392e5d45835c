"""Digests of pages: what a sender says its pages are, for the receiver to hold against what has arrived.

A page is one block's keys or values in one layer, as the receiver lays it out. Its digest is the sum of its 32-bit
words, each times an odd weight of its place, modulo 2**32: a changed word always changes it, and the digests of a
page's parts add up to the page's, so that several parts and several senders need not agree where they cut.
"""

import asyncio
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from .layout import CorruptPages, KvLayout, SlotRun
from .packed_form import packed_bytes
from .packing import pack, unpack
from .page_store import PageStore
from .slots import cut_runs, num_slots

WORD = 4
GOLDEN = 0x9E3779B1
"""2**32 over the golden ratio, made odd: multiples of it are spread evenly (Knuth, TAOCP 3, 6.4)."""
PIECE_TOKENS = 256
"""Tokens of a layer that are looked at without letting the event loop run: a multiple of those that share a scale."""

Words = NDArray[np.uint32]


class Digests:
    """The digests of the pages of the tokens ``[begin, end)``: uint32 [num_layers, 2, num_pages]."""

    def __init__(self, layout: KvLayout, begin: int, end: int) -> None:
        """Raises ValueError for a layout whose slots are no whole number of words."""
        if layout.slot_bytes % WORD:
            raise ValueError(f"pages can be verified only where a slot is a multiple of {WORD} bytes: {layout}")
        self._layout = layout
        self._first = begin // layout.block_size
        num_pages = -(-end // layout.block_size) - self._first if end > begin else 0
        self.values: Words = np.zeros((layout.num_layers, 2, num_pages), dtype=np.uint32)
        width = layout.slot_bytes // WORD
        places = np.arange(layout.block_size * width, dtype=np.uint32) * np.uint32(GOLDEN) | np.uint32(1)
        self._weights: Words = places.reshape(layout.block_size, width)

    async def add_pages(
        self, store: PageStore, runs: Sequence[SlotRun], token_begin: int, layers: range, *, via: str = ""
    ) -> None:
        """Add slots of ``store`` that hold the KV of the tokens from ``token_begin`` on, as the receiver will see them.

        ``via``: what they are converted to on their way. Lets the event loop run between pieces.
        """
        total = num_slots(runs)
        for begin in range(0, total, PIECE_TOKENS):
            cut = cut_runs(runs, begin, min(begin + PIECE_TOKENS, total))
            for layer in layers:
                self._add(store, cut, token_begin + begin, range(layer, layer + 1), via)
                await asyncio.sleep(0)

    def _add(self, store: PageStore, runs: Sequence[SlotRun], token_begin: int, layers: range, via: str) -> None:
        count, dtype = num_slots(runs), self._layout.dtype
        packed = _packed(store, runs, layers, via or dtype)
        if via not in ("", dtype):
            # As the receiver will unpack it: two roundings are not one.
            there = PageStore.in_process(msgspec.structs.replace(self._layout, num_layers=len(layers)), count)
            one_run, same = (SlotRun(0, count),), range(len(layers))
            unpack(there, one_run, same, memoryview(packed), wire_dtype=via)
            packed = _packed(there, one_run, same, dtype)
        words = np.frombuffer(packed, dtype=np.uint32).reshape(len(layers), 2, count, -1)
        size = self._layout.block_size
        tokens = np.arange(token_begin, token_begin + count)
        # Sums of uint32 are taken modulo 2**32.
        sums = (words * self._weights[tokens % size]).sum(axis=3, dtype=np.uint32)
        pages = tokens // size - self._first
        starts = np.flatnonzero(np.diff(pages, prepend=-1))
        added = np.add.reduceat(sums, starts, axis=2, dtype=np.uint32)
        self.values[layers.start : layers.stop, :, pages[starts]] += added

    def to_bytes(self) -> bytes:
        """Return them as little-endian words."""
        return self.values.astype("<u4").tobytes()

    def require(self, expected: bytes, reservation_id: str) -> None:
        """Raise CorruptPages unless these are the digests that the sender has sent."""
        values = self.values.reshape(-1)
        told = np.frombuffer(expected, dtype="<u4") if len(expected) == values.size * WORD else None
        if told is None:
            raise CorruptPages(reservation_id=reservation_id, num_pages=values.size, layer=0, block=self._first)
        wrong = np.flatnonzero(told != values)
        if len(wrong):
            num_pages = self.values.shape[2]
            layer, block = int(wrong[0]) // (2 * num_pages), self._first + int(wrong[0]) % num_pages
            raise CorruptPages(reservation_id=reservation_id, num_pages=len(wrong), layer=layer, block=block)


def _packed(store: PageStore, runs: Sequence[SlotRun], layers: range, dtype: str) -> bytearray:
    packed = bytearray(packed_bytes(store.layout, num_slots(runs), len(layers), dtype))
    pack(store, runs, layers, memoryview(packed), wire_dtype=dtype)
    return packed
