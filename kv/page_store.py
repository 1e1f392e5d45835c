"""A pool's memory, and copying slots from one pool into another.

The bytes are laid out as kv/layout.py says. Torch looks at the same bytes through ``torch.frombuffer(store.view)``;
nothing here needs it.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any

from .layout import KvLayout
from .slots import SlotCopy

PIECE_BYTES = 2 << 20
"""The most bytes copied without letting the event loop run: about 0.4 ms of it. A pass of the loop costs as much as
0.1 MiB (bench/transfer.py)."""


class PageStore:
    """The bytes of a pool. ``fd`` is its memfd, None for a pool that lives in this process only.

    The store owns its mapping and its fd until ``close``; the kernel keeps the memory while anybody maps it.
    """

    device = "cpu"
    """Where the bytes are; ``cuda:N`` for a DeviceStore (device_store.py)."""
    gpu = ""
    """The uuid of that GPU."""

    def __init__(
        self, layout: KvLayout, num_blocks: int, memory: bytearray | mmap.mmap, *, fd: int | None = None
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.fd = fd
        self.is_closed = False
        self.view = memoryview(memory)
        self._memory = memory
        self._half_bytes = num_blocks * layout.block_size * layout.slot_bytes
        import numpy  # Here, so that who has no pool does without, and nobody waits for it in the middle of a copy.

        self._as_array, self._uint8 = numpy.frombuffer, numpy.uint8

    @classmethod
    def in_process(cls, layout: KvLayout, num_blocks: int) -> "PageStore":
        """Make a pool of ordinary memory, for one process and for simulation."""
        return cls(layout, num_blocks, bytearray(num_blocks * layout.block_bytes))

    @classmethod
    def create(cls, layout: KvLayout, num_blocks: int) -> "PageStore":
        """Make a pool in a new memfd."""
        return cls.adopt(os.memfd_create("kv-pool", os.MFD_CLOEXEC), layout, num_blocks)

    @classmethod
    def adopt(cls, fd: int, layout: KvLayout, num_blocks: int) -> "PageStore":
        """Map an inherited memfd as its first user, growing it to its size. Takes the fd over."""
        num_bytes = num_blocks * layout.block_bytes
        if os.fstat(fd).st_size < num_bytes:
            os.ftruncate(fd, num_bytes)
        return cls.map(fd, layout, num_blocks)

    @classmethod
    def map(cls, fd: int, layout: KvLayout, num_blocks: int) -> "PageStore":
        """Map somebody's memfd. Takes the fd over. Raises ValueError if it is smaller than such a pool."""
        num_bytes = num_blocks * layout.block_bytes
        size = os.fstat(fd).st_size
        if size < num_bytes:
            os.close(fd)
            raise ValueError(f"a pool of {num_blocks} blocks takes {num_bytes} bytes, and this one has {size}")
        return cls(layout, num_blocks, mmap.mmap(fd, num_bytes), fd=fd)

    @property
    def memory(self) -> Any:
        """What numpy or torch can look into: a buffer here, an object with a CUDA array interface on a GPU."""
        return self.view

    @property
    def num_slots(self) -> int:
        """Slots in each layer."""
        return self.num_blocks * self.layout.block_size

    def offset(self, layer: int, half: int, slot: int) -> int:
        """Return where a slot's keys (half 0) or values (half 1) of a layer begin."""
        return (layer * 2 + half) * self._half_bytes + slot * self.layout.slot_bytes

    def slot(self, layer: int, half: int, slot: int) -> memoryview:
        """Return the bytes of a slot's keys (half 0) or values (half 1) of a layer."""
        begin = self.offset(layer, half, slot)
        return self.view[begin : begin + self.layout.slot_bytes]

    def page(self, layer: int, half: int, block: int) -> memoryview:
        """Return the bytes of a block's keys (half 0) or values (half 1) of a layer."""
        begin = self.offset(layer, half, block * self.layout.block_size)
        return self.view[begin : begin + self.layout.block_size * self.layout.slot_bytes]

    def rows(self) -> Any:
        """Return the pool as a numpy array of bytes: a row for each layer's keys, and one for its values.

        Let go of it before the pool may be closed.
        """
        return self._as_array(self.view, self._uint8).reshape(2 * self.layout.num_layers, self._half_bytes)

    def close(self) -> None:
        """Give up the mapping and the fd. A repeat does nothing. Slices and tensors of it that are left keep it."""
        self.is_closed = True
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        self.view.release()
        if isinstance(self._memory, mmap.mmap):
            try:
                self._memory.close()
            except BufferError:
                pass  # A tensor still looks into it; the mapping goes with that.


def copy_slots(
    source: PageStore,
    target: PageStore,
    copies: Sequence[SlotCopy],
    layers: range,
    *,
    piece_bytes: int = PIECE_BYTES,
) -> Iterator[int]:
    """Copy slots of some layers between pools whose slots are alike; yields the bytes copied, after each piece.

    Exhaust it, or what follows the last piece is not copied. Between two pieces it holds nothing of either pool.
    """
    assert source.layout.slot_bytes == target.layout.slot_bytes
    width = source.layout.slot_bytes
    first, last = 2 * layers.start, 2 * layers.stop
    read, write = source.rows(), target.rows()
    done = 0
    for copy in copies:
        begin, to, size = copy.source * width, copy.target * width, copy.count * width
        row, at = first, 0
        while row < last:
            # Hot: once per run for as many layers as fit into the piece (bench/transfer.py).
            room = piece_bytes - done
            num_rows, part = (min(last - row, room // size), size) if room >= size and not at else (1, size - at)
            part = min(part, room)
            write[row : row + num_rows, to + at : to + at + part] = read[
                row : row + num_rows, begin + at : begin + at + part
            ]
            done, at = done + num_rows * part, at + part
            if at == size:
                row, at = row + num_rows, 0
            if done == piece_bytes:
                del read, write
                yield done
                read, write, done = source.rows(), target.rows(), 0
    del read, write
    if done:
        yield done
