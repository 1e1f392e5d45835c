"""Free blocks an engine holds for its growing sequences, so that a decode step sends no message."""

from array import array
from collections.abc import Iterable


class Slab:
    """A small stack of leased blocks. It knows when it wants more, and whether the pool has none left to give."""

    def __init__(self) -> None:
        self._blocks: list[int] = []
        self.target = 0
        self.is_exhausted = False
        """A refill waits in vain: whoever lacks a block must make room itself."""

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def wants(self) -> int:
        """How many blocks to ask for now: none while at least half of the target is here."""
        if not self.target or len(self._blocks) * 2 >= self.target:
            return 0
        return self.target - len(self._blocks)

    def take(self) -> int | None:
        """Remove and return a block, or None when there is none."""
        return self._blocks.pop() if self._blocks else None

    def refill(self, blocks: Iterable[int]) -> None:
        """Add leased blocks, perhaps none."""
        self._blocks.extend(blocks)
        self.is_exhausted = False

    def give(self, num_blocks: int | None = None) -> bytes:
        """Remove up to ``num_blocks`` blocks (None: all) and return them as int32 bytes."""
        count = len(self._blocks) if num_blocks is None else min(num_blocks, len(self._blocks))
        given = self._blocks[len(self._blocks) - count :]
        del self._blocks[len(self._blocks) - count :]
        return array("i", given).tobytes()

    def clear(self) -> None:
        """Forget every block: the manager that lent them is gone."""
        self._blocks.clear()
        self.is_exhausted = False

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that are here."""
        return tuple(self._blocks)
