"""Blocks for whoever needs some: free ones first, then idle ones of the prefix cache."""

from .block_pool import BlockPool
from .layout import OutOfBlocks
from .prefix_cache import PrefixCache


class Allocator:
    """A pool and the prefix cache over it. Blocks go back by ``cache.unpin``."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache(self.pool, block_size)

    @property
    def num_available(self) -> int:
        """Blocks that can be had now: free ones, and idle ones of the cache."""
        return self.pool.num_free + self.cache.num_idle

    def blocks_for(self, count: int) -> int:
        """Return how many blocks ``count`` tokens need."""
        return -(-count // self.block_size)

    def require_fit(self, total: int) -> None:
        """Raise OutOfBlocks for a sequence that fits into no pool of this size, however empty."""
        if total > self.pool.num_blocks:
            raise OutOfBlocks(needed=total, free=self.num_available)

    def allocate(self, count: int) -> list[int]:
        """Take free blocks, evicting idle ones if need be. Raises OutOfBlocks and changes nothing."""
        short = count - self.pool.num_free
        if short > 0 and not self.cache.evict(short):
            raise OutOfBlocks(needed=count, free=self.num_available)
        return self.pool.allocate(count)

    def take(self, matched: tuple[int, ...], total: int) -> tuple[int, ...]:
        """Pin the matched blocks and add new ones up to ``total``. Raises OutOfBlocks and changes nothing."""
        self.require_fit(total)
        # Pinned first, so that making room for the rest does not evict them.
        self.cache.pin(matched)
        try:
            return (*matched, *self.allocate(max(0, total - len(matched))))
        except OutOfBlocks:
            self.cache.unpin(matched)
            raise
