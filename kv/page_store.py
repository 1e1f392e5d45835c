"""A pool's memory, and copying slots from one pool into another.

The bytes are laid out as kv/layout.py says. Torch looks at the same bytes through ``torch.frombuffer(store.view)``;
nothing here needs it.
"""

import mmap
import os
from collections.abc import Iterator, Sequence

from .layout import KvLayout
from .slots import SlotCopy

PIECE_BYTES = 1 << 20
"""The most bytes copied without letting the event loop run: about 0.2 ms of it."""


class PageStore:
    """The bytes of a pool. ``fd`` is its memfd, None for a pool that lives in this process only.

    The store owns its mapping and its fd until ``close``; the kernel keeps the memory while anybody maps it.
    """

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

    Exhaust it, or what follows the last piece is not copied.
    """
    # Hot: once per run, layer and half. Slices of memoryviews cost one memcpy each.
    assert source.layout.slot_bytes == target.layout.slot_bytes
    width = source.layout.slot_bytes
    read, write = source.view, target.view
    done = 0
    for layer in layers:
        for half in (0, 1):
            read_base, write_base = source.offset(layer, half, 0), target.offset(layer, half, 0)
            for copy in copies:
                begin, to, left = read_base + copy.source * width, write_base + copy.target * width, copy.count * width
                while left:
                    size = min(left, piece_bytes - done)
                    write[to : to + size] = read[begin : begin + size]
                    begin, to, left, done = begin + size, to + size, left - size, done + size
                    if done == piece_bytes:
                        yield done
                        done = 0
    if done:
        yield done
