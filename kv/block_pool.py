"""Which blocks are free, and how often the others are held.

The pool knows nothing of what blocks hold. Everybody who needs a block to stay holds one reference to it: a sequence,
a slab, a reservation, the prefix cache.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from .layout import OutOfBlocks


class PoolWatch(Protocol):
    """Who hears which blocks become free and which are lent: the simulation (poison.py). ``problems`` it has seen."""

    problems: list[str]

    def freed(self, blocks: Sequence[int]) -> None:
        """Blocks that nobody holds any more."""

    def taken(self, blocks: Sequence[int]) -> None:
        """Blocks that were free until now."""


class BlockPool:
    """Free list and reference counts of blocks ``0 .. num_blocks - 1``."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # A stack, popped from the end: fresh blocks come in ascending order, so that their slots are adjacent.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks
        self.watch: PoolWatch | None = None

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def refs(self, block: int) -> int:
        """Return how many holders the block has."""
        return self._refs[block]

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free blocks, each with one reference. Raises OutOfBlocks and changes nothing."""
        if count > len(self._free):
            raise OutOfBlocks(needed=count, free=len(self._free))
        if count <= 0:
            return []
        blocks = self._free[-count:]
        blocks.reverse()
        del self._free[-count:]
        for block in blocks:
            self._refs[block] = 1
        if self.watch is not None:
            self.watch.taken(blocks)
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """Add one reference to each of these held blocks."""
        for block in blocks:
            assert self._refs[block] > 0, f"block {block} is free and cannot be retained"
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Take one reference from each; a block without holders is free again."""
        num_free = len(self._free)
        # Backwards, so that the next to allocate gets them in the same order.
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} is free and cannot be released"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free.append(block)
        if self.watch is not None:
            self.watch.freed(self._free[num_free:])

    def check_integrity(self) -> list[str]:
        """Return what is wrong: nothing, unless there is a bug."""
        problems: list[str] = []
        if self.watch is not None:
            self.watch.taken(self._free)
            problems += self.watch.problems
        free = set(self._free)
        if len(free) != len(self._free):
            problems.append("a block is twice in the free list")
        for block, refs in enumerate(self._refs):
            if (refs == 0) != (block in free):
                problems.append(f"block {block} has {refs} references and is {'' if block in free else 'not '}free")
        return problems
