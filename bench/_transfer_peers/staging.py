"""What packs and unpacks where a peer has nothing for it: numpy, all pages of a block at once."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from _transfer_job import LAYOUT, NUM_ROWS, PAGE_BYTES

from callboard.kv.page_store import PageStore

PIECE_BLOCKS = 4
"""2 MiB: four of them stay in a cache, and a message costs little beside one."""
PIECE_BYTES = PIECE_BLOCKS * LAYOUT.block_bytes


def pieces(blocks: list[int]) -> Iterator[list[int]]:
    """Cut a job's blocks into pieces."""
    for first in range(0, len(blocks), PIECE_BLOCKS):
        yield blocks[first : first + PIECE_BLOCKS]


class Packer:
    """Copies blocks of a pool into a buffer (bytes of ``LAYOUT.block_bytes`` each), and back."""

    def __init__(self, store: PageStore) -> None:
        self._rows = store.rows()

    def pack(self, blocks: list[int], buffer: Any) -> int:
        """Fill the beginning of a buffer; return how many bytes that is."""
        size: int = len(blocks) * LAYOUT.block_bytes
        packed = np.frombuffer(buffer, np.uint8, size).reshape(len(blocks), NUM_ROWS, PAGE_BYTES)
        for number, block in enumerate(blocks):
            packed[number] = self._rows[:, block * PAGE_BYTES : (block + 1) * PAGE_BYTES]
        return size

    def unpack(self, blocks: list[int], buffer: Any) -> None:
        packed = np.frombuffer(buffer, np.uint8, len(blocks) * LAYOUT.block_bytes).reshape(len(blocks), NUM_ROWS, -1)
        for number, block in enumerate(blocks):
            self._rows[:, block * PAGE_BYTES : (block + 1) * PAGE_BYTES] = packed[number]
