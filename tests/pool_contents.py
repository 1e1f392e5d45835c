"""A block manager with real memory under it: who writes what, and what is found there."""

import hashlib
from collections.abc import Sequence

from block_managers import make

from callboard.kv.block_manager import BlockManager, Loan
from callboard.kv.layout import KvLayout
from callboard.kv.page_store import PageStore, copy_slots
from callboard.kv.poison import Poison
from callboard.kv.reservation_table import Held
from callboard.kv.slots import SlotCopy
from callboard.kv.tokens import pack_tokens


def kv_of(ids: Sequence[int], position: int, half: int) -> bytes:
    """Return a token's KV: like a model's, a function of all tokens up to it."""
    return hashlib.blake2b(pack_tokens(ids[: position + 1]) + bytes([half]), digest_size=8).digest()


class Pool:
    """A pool of eight bytes a slot whose free blocks are poisoned."""

    def __init__(self, num_blocks: int = 24, block_size: int = 4) -> None:
        self.manager: BlockManager = make(num_blocks, block_size)
        self.store = PageStore.in_process(KvLayout(1, 1, 2, block_size), num_blocks)
        self.manager.allocator.pool.watch = Poison(self.store)
        self.block_size = block_size
        self.num_copied = 0

    def slot(self, table: Sequence[int], position: int) -> int:
        return table[position // self.block_size] * self.block_size + position % self.block_size

    def compute(self, ids: Sequence[int], table: Sequence[int], begin: int, end: int) -> None:
        """Write the KV of ``[begin, end)``, as an engine does."""
        for position in range(begin, end):
            for half in (0, 1):
                self.store.slot(0, half, self.slot(table, position))[:] = kv_of(ids, position, half)

    def copy(self, source: Sequence[int], target: Sequence[int], begin: int, end: int) -> None:
        copies = [SlotCopy(self.slot(source, i), self.slot(target, i), 1) for i in range(begin, end)]
        list(copy_slots(self.store, self.store, copies, range(1)))
        self.num_copied += end - begin

    def holds(self, ids: Sequence[int], table: Sequence[int], end: int) -> bool:
        """Return whether ``table`` has the KV of the first ``end`` tokens."""
        return all(
            self.store.slot(0, half, self.slot(table, i)) == kv_of(ids, i, half) for i in range(end) for half in (0, 1)
        )

    def run(self, ids: Sequence[int], sequence_id: str = "run") -> None:
        """Have the engine compute a sequence and end it: its full blocks are cached."""
        grant = self.manager.admit("e", sequence_id, pack_tokens(ids))
        self.compute(ids, grant.block_table, grant.num_cached_tokens, len(ids))
        self.manager.finish("e", sequence_id, pack_tokens(ids), grant.block_table)

    def lend(self, ids: Sequence[int], end: int) -> Loan:
        """Lend the KV of ``ids[:end]``, computed where it was not cached."""
        loan = self.manager.lend("e", pack_tokens(ids), end)
        if loan.engine is not None:
            self.compute(ids, loan.block_table, loan.num_cached_tokens, end)
            assert self.manager.has_computed(loan)
        return loan

    def open(self, held: Held, write_id: str, begin: int, end: int) -> None:
        self.manager.reservations.open_write(
            held.reservation.id, write_id, begin=begin, end=end, writer="self", now=0.0
        )

    def close(self, held: Held, write_id: str, *, is_complete: bool = True) -> None:
        self.manager.reservations.close_write(held.reservation.id, write_id, is_complete=is_complete, now=0.0)

    def hand_over(self, ids: Sequence[int], held: Held, begin: int, end: int, *, write_id: str = "w") -> None:
        """Fill ``[begin, end)`` of a reservation as a manager does for one of its own."""
        self.open(held, write_id, begin, end)
        loan = self.lend(ids, end)
        table = held.block_table
        for first, last in self.manager.graft(loan, held.reservation.id, write_id):
            self.copy(loan.block_table, table, first, last)
        self.manager.end_loan(loan)
        self.close(held, write_id)
        assert self.manager.check_integrity() == []
