"""Every decision about a pool's blocks: the synchronous core of a KV manager.

It never awaits and knows no messages. Each method either does all it says, or raises and changes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from callboard.bus import UnknownActor

from .accounts import EngineAccount, Grant, SequenceLease
from .allocator import Allocator
from .layout import OutOfBlocks, StaleReservation
from .reservation import State
from .reservation_table import ReservationTable
from .tokens import TOKEN_BYTES, num_tokens


@dataclass(frozen=True, slots=True)
class Loan:
    """Blocks of ``tokens``, held for sending them: ``engine`` computes what is not cached.

    Without an engine all of it is cached.
    """

    loan_id: str
    engine: str | None
    tokens: bytes
    block_table: tuple[int, ...]
    num_cached_tokens: int
    attachment: str = ""
    """The engine's, by which the blocks are its."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Where every block is; they add up to ``num_blocks``."""

    num_blocks: int
    free: int
    cached: int
    leased: int
    reserved: int
    quarantined: int
    num_reservations: int
    num_evicted: int


class BlockManager:
    """A pool, its prefix cache, its reservations, and what each engine holds.

    ``new_id`` makes ids; times are seconds of the caller's clock. ``node`` is only for error sentences.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, lease_s: float, new_id: Callable[[], str], node: str = ""
    ) -> None:
        self.allocator = Allocator(num_blocks, block_size)
        self.cache = self.allocator.cache
        self.reservations = ReservationTable(self.allocator, lease_s=lease_s, new_id=new_id)
        self._new_id = new_id
        self._node = node
        self._engines: dict[str, EngineAccount] = {}
        self._lost: dict[str, EngineAccount] = {}
        """Accounts in quarantine, by attachment."""
        self._loans: dict[str, tuple[int, ...]] = {}

    def account(self, engine: str, attachment: str = "") -> EngineAccount:
        """Return an attached engine's account, that of this attachment if one is named. Raises UnknownActor."""
        account = self._engines.get(engine)
        if account is None or attachment not in ("", account.attachment):
            raise UnknownActor(actor=engine, node=self._node)
        return account

    def slabs(self) -> dict[str, int]:
        """Return the number of slab blocks of each attached engine."""
        return {name: len(account.slab) for name, account in self._engines.items()}

    # ---- engines -------------------------------------------------------------------------------------------------

    def attach(self, engine: str, incarnation: str, node: str = "") -> EngineAccount:
        """Open an engine's account.

        What its process held before is given back: it has let go of it. So is what another process held on the same
        node, for that one is dead. But one that has taken the name over says nothing about who had it before.
        """
        if (before := self._engines.get(engine)) is not None:
            self.detach(before, is_known=False)
        for old in list(self._lost.values()):
            if old.engine == engine and (old.incarnation == incarnation or old.node == node):
                self.detach(old, is_known=True)
        self._engines[engine] = account = EngineAccount(engine, incarnation, node, self._new_id())
        return account

    def detach(self, account: EngineAccount, *, is_known: bool) -> None:
        """Close an account: give all back if it is known that the engine writes no more, else quarantine it."""
        if self._engines.get(account.engine) is account:
            del self._engines[account.engine]
        elif self._lost.pop(account.attachment, None) is None:
            return
        blocks = account.all_blocks()
        if is_known:
            self.cache.unpin(blocks)
        elif blocks:
            self._lost[account.attachment] = account

    def granted(self, engine: str, sequence_id: str, attachment: str = "") -> Grant | None:
        """Return what a sequence was admitted with, None if it was not: for a repeat. Raises UnknownActor."""
        lease = self.account(engine, attachment).sequences.get(sequence_id)
        if lease is None:
            return None
        lease.num_claims += 1
        return lease.grant

    def lease(self, engine: str, sequence_id: str) -> SequenceLease | None:
        """Return what a sequence of an attached engine holds, None if there is none."""
        account = self._engines.get(engine)
        return None if account is None else account.sequences.get(sequence_id)

    def disclaim(self, engine: str, sequence_id: str) -> None:
        """Take one admission back, of which nobody has heard; the last one gives the sequence's blocks back."""
        account = self._engines.get(engine)
        lease = None if account is None else account.sequences.get(sequence_id)
        if lease is not None:
            lease.num_claims -= 1
            if not lease.num_claims:
                self.finish(engine, sequence_id, b"", ())

    def admit(self, engine: str, sequence_id: str, tokens: bytes, attachment: str = "") -> Grant:
        """Match ``tokens`` and lease blocks for all of them. A repeat gets the same grant.

        Raises OutOfBlocks, UnknownActor.
        """
        repeated = self.granted(engine, sequence_id, attachment)
        if repeated is not None:
            return repeated
        match = self.cache.match(tokens)
        table = self.allocator.take(match.blocks, self.allocator.blocks_for(num_tokens(tokens)))
        self.cache.note_query(num_tokens(tokens), match.num_tokens)
        return self._grant(engine, sequence_id, Grant(table, match.num_tokens))

    def adopt(self, engine: str, sequence_id: str, tokens: bytes, reservation_id: str, attachment: str = "") -> Grant:
        """Move a sealed reservation's blocks to a sequence, and lease what ``tokens`` needs beyond them.

        A repeat gets the same grant. Raises OutOfBlocks, StaleReservation, UnknownActor.
        """
        repeated = self.granted(engine, sequence_id, attachment)
        if repeated is not None:
            return repeated
        held = self.reservations.get(reservation_id)
        reservation = held.reservation
        in_place = max(held.num_cached_tokens, reservation.end)
        if tokens[: in_place * TOKEN_BYTES] != held.prompt[: in_place * TOKEN_BYTES]:
            raise StaleReservation(reservation_id=reservation_id, reason="it was made for other tokens")
        if reservation.state is not State.SEALED:
            raise StaleReservation(reservation_id=reservation_id, reason=f"it is {reservation.state}")
        total = self.allocator.blocks_for(num_tokens(tokens))
        self.allocator.require_fit(total)
        more = self.allocator.allocate(max(0, total - len(held.block_table)))
        self.reservations.take(held)
        return self._grant(engine, sequence_id, Grant((*held.block_table, *more), in_place))

    def refill(self, engine: str, count: int, attachment: str = "") -> list[int]:
        """Lease up to ``count`` blocks to an engine's slab; perhaps none. Raises UnknownActor."""
        account = self.account(engine, attachment)
        count = min(count, self.allocator.num_available)
        while count > 0:
            try:
                blocks = self.allocator.allocate(count)
            except OutOfBlocks:
                # Not all that is idle can be evicted: some lies above blocks in use.
                count //= 2
                continue
            account.slab.update(dict.fromkeys(blocks))
            return blocks
        return []

    def give(self, engine: str, blocks: Sequence[int], attachment: str = "") -> None:
        """Take slab blocks back. Those of another attachment are ignored: they may have been lent anew since."""
        account = self._engines.get(engine)
        if account is None or attachment not in ("", account.attachment):
            return
        given = [block for block in dict.fromkeys(blocks) if block in account.slab]
        for block in given:
            del account.slab[block]
        self.cache.unpin(given)

    def seal(self, engine: str, sequence_id: str, tokens: bytes, block_table: Sequence[int]) -> None:
        """Let a sequence's full blocks into the cache. Does nothing for a sequence unknown here.

        Raises ValueError for a table that cannot be the sequence's.
        """
        account = self._engines.get(engine)
        if account is not None and sequence_id in account.sequences:
            account.absorb(account.sequences[sequence_id], block_table)
            self.cache.insert(tokens, block_table)

    def finish(self, engine: str, sequence_id: str, tokens: bytes, block_table: Sequence[int]) -> None:
        """Seal, and give the sequence's blocks back, also where sealing raises ValueError. A repeat does nothing."""
        account = self._engines.get(engine)
        if account is None or sequence_id not in account.sequences:
            return
        try:
            self.seal(engine, sequence_id, tokens, block_table)
        finally:
            self.cache.unpin(account.sequences.pop(sequence_id).blocks)

    # ---- sending -------------------------------------------------------------------------------------------------

    def lend(self, engine: str, prompt: bytes, end: int) -> Loan:
        """Hold the blocks of ``prompt[:end]`` for sending; the engine is to compute what is not cached.

        Raises OutOfBlocks, UnknownActor.
        """
        loan_id = f"send:{self._new_id()}"
        tokens = prompt[: end * TOKEN_BYTES]
        match = self.cache.match(prompt)
        total = self.allocator.blocks_for(end)
        if match.num_tokens >= end:
            table = match.blocks[:total]
            self.cache.pin(table)
            self.cache.note_query(end, end)
            self._loans[loan_id] = table
            return Loan(loan_id, None, tokens, table, end)
        grant = self.admit(engine, loan_id, tokens)
        attachment = self.account(engine).attachment
        return Loan(loan_id, engine, tokens, grant.block_table, grant.num_cached_tokens, attachment)

    def lend_held(
        self, engine: str, sequence_id: str, tokens: bytes, block_table: Sequence[int], attachment: str = ""
    ) -> Loan | None:
        """Hold the blocks of a sequence that goes on for sending: the KV of all ``tokens`` is in place there.

        The last may be filled in part; its engine goes on writing behind the tokens. Returns None for a sequence
        unknown here. Raises UnknownActor, and ValueError for a table that cannot be the sequence's.
        """
        account = self.account(engine, attachment)
        lease = account.sequences.get(sequence_id)
        if lease is None:
            return None
        if len(block_table) != self.allocator.blocks_for(num_tokens(tokens)):
            raise ValueError(f"{len(block_table)} blocks are not those of {num_tokens(tokens)} tokens")
        account.absorb(lease, block_table)
        table = tuple(block_table)
        self.cache.pin(table)
        loan_id = f"send:{self._new_id()}"
        self._loans[loan_id] = table
        return Loan(loan_id, None, tokens, table, num_tokens(tokens))

    def has_computed(self, loan: Loan) -> bool:
        """Take a loan back from the engine that has computed it, for the rest of its life, and cache it.

        Returns False, and does nothing, if the engine was detached meanwhile: the blocks may be others' by now.
        """
        account = self._engines.get(loan.engine) if loan.engine is not None else None
        if account is None or loan.loan_id not in account.sequences:
            return False
        self._loans[loan.loan_id] = tuple(account.sequences.pop(loan.loan_id).blocks)
        self.cache.insert(loan.tokens, loan.block_table)
        return True

    def graft(self, loan: Loan, reservation_id: str, write_id: str) -> tuple[tuple[int, int], ...]:
        """Let a write here have the loan's own blocks, all of whose KV is in place; return the ranges left to copy.

        The reservation has them once the write is complete, and gives back what it had in their places. Left to copy
        are the tokens of blocks that others write as well, and of a part-filled block that is sealed: who adopts the
        reservation writes behind them. A loan is grafted once. Raises StaleReservation if the write is not open, or of
        other tokens.
        """
        assert self._loans.get(loan.loan_id) == loan.block_table, "its KV is not in place, or it was grafted before"
        held = self.reservations.get(reservation_id)
        held.reservation.require_open()
        write = held.reservation.writes.get(write_id)
        if write is None:
            raise StaleReservation(reservation_id=reservation_id, reason="this write is not open")
        if loan.tokens[: write.end * TOKEN_BYTES] != held.prompt[: write.end * TOKEN_BYTES]:
            raise StaleReservation(reservation_id=reservation_id, reason="it was made for other tokens")
        size = self.allocator.block_size
        first, last = -(-write.begin // size), write.end // size
        grafts = {index: loan.block_table[index] for index in range(first, last)}
        self.cache.pin(list(grafts.values()))
        is_all_of_tail = write.begin <= last * size < write.end == held.reservation.end
        if is_all_of_tail and self.allocator.pool.refs(loan.block_table[last]) == 1:
            # Nobody but the loan has it: the hold passes on, and with it the right to write behind the tokens.
            grafts[last] = tail = loan.block_table[last]
            self._loans[loan.loan_id] = tuple(block for block in self._loans[loan.loan_id] if block != tail)
        self.reservations.graft(held, write_id, grafts)
        ungrafted = [(write.begin, min(first * size, write.end)), (max(last * size, write.begin), write.end)]
        if last in grafts:
            ungrafted.pop()
        return tuple(dict.fromkeys((begin, end) for begin, end in ungrafted if begin < end))

    def end_loan(self, loan: Loan) -> None:
        """Give a loan back: nobody reads or writes its blocks any more. A repeat does nothing."""
        if loan.loan_id in self._loans:
            self.cache.unpin(self._loans.pop(loan.loan_id))
        elif loan.engine is not None:
            self.finish(loan.engine, loan.loan_id, b"", ())

    def is_with_engine(self, loan: Loan) -> bool:
        """Return whether the engine may still write into the loan's blocks, and is attached."""
        account = self._engines.get(loan.engine) if loan.engine is not None else None
        return account is not None and loan.loan_id in account.sequences

    def _grant(self, engine: str, sequence_id: str, grant: Grant) -> Grant:
        lease = self._engines[engine].sequences[sequence_id] = SequenceLease(grant)
        lease.num_claims = 1
        return grant

    # ---- accounting ----------------------------------------------------------------------------------------------

    @property
    def num_quarantined(self) -> int:
        """Blocks that nobody may have until a writer is known to be dead."""
        found = set(self.reservations.blocks(is_quarantined=True))
        return len(found.union(*(account.all_blocks() for account in self._lost.values())))

    def quarantined_by(self) -> dict[str, int]:
        """Return how many blocks each process keeps in quarantine, by its incarnation; shared ones count for each."""
        found = self.reservations.quarantined_by()
        for account in self._lost.values():
            found[account.incarnation] = found.get(account.incarnation, 0) + len(account.all_blocks())
        return found

    def lost_nodes(self) -> dict[str, str]:
        """Return the nodes of the engines whose blocks are in quarantine, by incarnation."""
        return {account.incarnation: account.node for account in self._lost.values()}

    def counts(self) -> Counts:
        """Count where every block is. One that several hold counts as what is hardest to get back."""
        places = self._places()
        found = dict.fromkeys(("quarantined", "leased", "reserved"), 0)
        counted: set[int] = set()
        for name in found:
            fresh = set(places[name]) - counted
            found[name] = len(fresh)
            counted |= fresh
        return Counts(
            num_blocks=self.allocator.pool.num_blocks,
            free=self.allocator.pool.num_free,
            cached=self.cache.num_idle,
            num_reservations=len(self.reservations),
            num_evicted=self.cache.num_evicted,
            **found,
        )

    def check_integrity(self) -> list[str]:
        """Return what is wrong: nothing, unless there is a bug."""
        pool = self.allocator.pool
        problems = pool.check_integrity() + self.cache.check_integrity() + self.reservations.check_integrity()
        holds = [0] * pool.num_blocks
        for blocks in self._places().values():
            for block in blocks:
                holds[block] += 1
        for block in range(pool.num_blocks):
            expected = holds[block] + (block in self.cache)
            if pool.refs(block) != expected:
                problems.append(f"block {block} has {pool.refs(block)} references and {expected} holders")
        for account in (*self._engines.values(), *self._lost.values()):
            for block in account.slab:
                if pool.refs(block) != 1 or block in self.cache:
                    problems.append(f"slab block {block} of {account.engine} is somebody else's too")
        counts = self.counts()
        total = counts.free + counts.cached + counts.leased + counts.reserved + counts.quarantined
        if total != counts.num_blocks:
            problems.append(f"{total} of {counts.num_blocks} blocks are accounted for")
        return problems

    def _places(self) -> dict[str, list[int]]:
        """Return the blocks of each kind of holder, once for each hold."""
        places: dict[str, list[int]] = {
            "quarantined": self.reservations.blocks(is_quarantined=True),
            "leased": [block for table in self._loans.values() for block in table],
            "reserved": self.reservations.blocks(is_quarantined=False),
        }
        for account in self._engines.values():
            places["leased"].extend(account.all_blocks())
        for account in self._lost.values():
            places["quarantined"].extend(account.all_blocks())
        return places
