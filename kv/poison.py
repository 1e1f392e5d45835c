"""Poison in the free blocks of a simulated pool: who reads one gets nonsense, and who writes one is found out."""

from collections.abc import Iterable, Sequence

from .page_store import PageStore

BYTE = 0xA5
MOST_PROBLEMS = 20


class Poison:
    """Fills blocks when they become free, and sees when they are lent again whether anybody wrote into them.

    Without it, a block that is lent again to a request with the same tokens (a retry) would hold what that request
    would have written: KV that never arrived would look right.
    """

    def __init__(self, store: PageStore) -> None:
        self.problems: list[str] = []
        self._store = store
        self._page = bytes([BYTE]) * (store.layout.block_size * store.layout.slot_bytes)
        self.freed(range(store.num_blocks))

    def freed(self, blocks: Iterable[int]) -> None:
        """Fill blocks that nobody holds any more."""
        for page in self._pages(blocks):
            page[:] = self._page

    def taken(self, blocks: Sequence[int]) -> None:
        """Note which of these free blocks were written meanwhile; they are whole again afterwards."""
        for block in blocks:
            if any(page != self._page for page in self._pages((block,))):
                if len(self.problems) < MOST_PROBLEMS:
                    self.problems.append(f"block {block} was written while it was free")
                self.freed((block,))

    def _pages(self, blocks: Iterable[int]) -> Iterable[memoryview]:
        if self._store.is_closed:
            return
        for block in blocks:
            for layer in range(self._store.layout.num_layers):
                yield self._store.page(layer, 0, block)
                yield self._store.page(layer, 1, block)
