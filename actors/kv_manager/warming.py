"""Bringing KV back from the tiers: before the books decide about a prompt, or into the blocks that it was granted.

``warm`` comes first, for whoever asks: what the prompt lacks goes into blocks that are free or idle, and idle they
stay, so that who waits for blocks gets no less of them; then the match finds them. Who had to wait for its blocks had
no room for that before: ``fill`` brings it into the blocks that it has got, before an engine hears of them.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from callboard.bus import current_call
from callboard.bus.calls import enter_call
from callboard.kv.accounts import Grant
from callboard.kv.block_manager import Loan
from callboard.kv.layout import OutOfBlocks
from callboard.kv.tiers import BlockName, Bytes, copy_in
from callboard.kv.tokens import TOKEN_BYTES, num_tokens

from .pool_actor import PoolActor
from .tiering import Tiering

FETCH_BYTES = 8 << 20
"""What is read from the disk at once; the deadline is looked at in between."""
LAND_BYTES = 2 << 20
"""What is copied into the pool in one pass of the loop: 0.4 ms or less."""
MOST_LOADS = 4
"""Loads that read at the same time."""
PATIENCE_S = 0.02
PATIENCE_S_PER_TOKEN = {"cpu": 1e-3, "cuda": 1e-4}
"""How long a request waits for a tier: about as long as computing would take on such a device (measured: 700 tokens/s
of SmolLM2 on two cores in fp32; 70B models on a GPU take 0.1 to 0.2 ms a token)."""


class _Load:
    """Blocks of one chain on their way into the pool, for all who wait for them."""

    def __init__(self, tokens: bytes, begin: int, names: Sequence[BlockName]) -> None:
        self.tokens = tokens
        self.begin = begin
        """The number of blocks before the first one."""
        self.names = names
        self.num_waiting = 0
        self.is_over: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Warming:
    """Brings KV back for one manager."""

    def __init__(self, manager: PoolActor, tiers: Tiering) -> None:
        self._manager = manager
        self._tiers = tiers
        self._blocks = manager.blocks
        self._cache = manager.blocks.cache
        self._layout = manager.config.layout
        self._block_bytes = self._layout.block_size * TOKEN_BYTES
        self._loads: dict[bytes, _Load] = {}
        self._reading = asyncio.Semaphore(MOST_LOADS)
        kind = manager.config.device.partition(":")[0]
        self._patience_s = PATIENCE_S_PER_TOKEN.get(kind, PATIENCE_S_PER_TOKEN["cpu"])

    async def warm(self, prompt: bytes, end: int | None = None) -> None:
        """Bring what the tiers hold of ``prompt[:end]`` into the cache, unless computing it would be as fast.

        Two who want the same wait for one reading of it. Does nothing where the pool lacks blocks for the prompt.
        """
        total = self._blocks.allocator.blocks_for(num_tokens(prompt) if end is None else end)
        prompt = prompt[: total * self._block_bytes]
        missing = self._wanted(prompt, total)
        if not missing:
            return
        before = self._cache.match(prompt).num_tokens
        async with self._patience(len(missing), lambda: self._cache.match(prompt).num_tokens - before):
            while missing:
                first = missing[0]
                await self._loaded(prompt, missing)
                missing = self._wanted(prompt, total)
                if missing and missing[0] == first:
                    break  # It cannot be had.

    async def fill(self, engine: str, sequence_id: str, tokens: bytes, grant: Grant) -> Grant:
        """Bring what the tiers hold of ``tokens`` into the blocks that a sequence was granted just now.

        Nobody but its engine may write there, which has not heard of them: stops as soon as that may have changed.
        Returns the grant as it is then.
        """
        size, lease = self._layout.block_size, self._blocks.lease(engine, sequence_id)
        if lease is None or lease.num_claims != 1:
            return grant
        depth = before = grant.num_cached_tokens // size
        names = list(self._tiers.held(tokens, grant.block_table[:depth]))
        if not names:
            return grant

        def put(found: Sequence[Bytes]) -> bool:
            nonlocal depth
            if lease.num_claims != 1 or self._blocks.lease(engine, sequence_id) is not lease:
                return False
            self._copy_in(grant.block_table[depth : depth + len(found)], found)
            depth += len(found)
            self._cache.insert(tokens[: depth * self._block_bytes], grant.block_table[:depth])
            lease.grant = replace(grant, num_cached_tokens=depth * size)
            return True

        async with self._patience(len(names), lambda: (depth - before) * size), self._reading:
            await self._bring(names, put, lambda: True)
        return lease.grant

    async def fill_loan(self, loan: Loan) -> Loan:
        """Do the same for what is lent to an engine, which is left the last block to compute."""
        if loan.engine is None:
            return loan
        most = (num_tokens(loan.tokens) - 1) // self._layout.block_size
        grant = Grant(loan.block_table, loan.num_cached_tokens)
        filled = await self.fill(loan.engine, loan.loan_id, loan.tokens[: most * self._block_bytes], grant)
        return replace(loan, num_cached_tokens=filled.num_cached_tokens)

    @asynccontextmanager
    async def _patience(self, num_blocks: int, num_loaded: Callable[[], int]) -> AsyncIterator[None]:
        """Give up the body when computing so many blocks would have been faster; note how long it took."""
        node = self._manager.node
        begin_s = node.clock.now()
        try:
            async with asyncio.timeout(PATIENCE_S + self._patience_s * num_blocks * self._layout.block_size):
                yield
        except TimeoutError:
            pass
        node.note(current_call(), "tier", begin_s, num_tokens=max(0, num_loaded()))

    def _wanted(self, prompt: bytes, total: int) -> list[BlockName]:
        """Return the names of the blocks worth loading; none where the prompt has to wait for blocks anyway."""
        held = list(self._tiers.held(prompt))
        num_missing = total - len(self._cache.match(prompt).blocks) if held else 0
        return held if num_missing <= self._blocks.allocator.num_available else []

    # ---- loads, which several may wait for -------------------------------------------------------------------------

    async def _loaded(self, prompt: bytes, missing: list[BlockName]) -> None:
        """Wait until the first of the missing blocks, and perhaps others, have been loaded, or cannot be."""
        load = self._loads.get(missing[0].key)
        if load is None:
            mine = []
            for name in missing:
                if name.key in self._loads:
                    break
                mine.append(name)
            load = _Load(prompt, len(self._cache.match(prompt).blocks), mine)
            for name in mine:
                self._loads[name.key] = load
            self._manager.spawn(self._run(load))
        load.num_waiting += 1
        try:
            await asyncio.shield(load.is_over)
        finally:
            load.num_waiting -= 1

    async def _run(self, load: _Load) -> None:
        """Read the blocks of a load and put them into the pool, as long as anybody waits for them."""
        enter_call(None)  # It is for whoever waits.
        depth = load.begin

        def put(found: Sequence[Bytes]) -> bool:
            nonlocal depth
            depth += len(found)
            return self._put(load.tokens[: depth * self._block_bytes], depth - len(found), found)

        try:
            async with self._reading:
                await self._bring(load.names, put, lambda: load.num_waiting > 0)
        finally:
            for name in load.names:
                del self._loads[name.key]
            if not load.is_over.done():
                load.is_over.set_result(None)

    def _put(self, tokens: bytes, depth: int, found: Sequence[Bytes]) -> bool:
        """Put the blocks of ``tokens`` behind the first ``depth`` into the pool and the cache."""
        allocator = self._blocks.allocator
        match = self._cache.match(tokens)
        if len(match.blocks) < depth:
            return False  # What they continue has been evicted.
        found = found[len(match.blocks) - depth :]
        try:
            table = allocator.take(match.blocks, len(match.blocks) + len(found))
        except OutOfBlocks:
            return False
        self._copy_in(table[len(match.blocks) :], found)
        self._cache.insert(tokens, table)
        self._cache.unpin(table)
        return True

    # ---- bytes -----------------------------------------------------------------------------------------------------

    async def _bring(
        self, names: Sequence[BlockName], put: Callable[[Sequence[Bytes]], bool], is_wanted: Callable[[], bool]
    ) -> None:
        """Fetch blocks and ``put`` them, some at a time, until it returns False or nobody wants them any more."""
        fetched, landed = (max(1, size // self._layout.block_bytes) for size in (FETCH_BYTES, LAND_BYTES))
        for begin in range(0, len(names), fetched):
            batch = names[begin : begin + fetched]
            if not is_wanted():
                return
            found = await self._tiers.fetch(batch)
            for at in range(0, len(found), landed):
                if not put(found[at : at + landed]):
                    return
                await asyncio.sleep(0)
            if len(found) < len(batch):
                return

    def _copy_in(self, blocks: Sequence[int], found: Sequence[Bytes]) -> None:
        for block, data in zip(blocks, found, strict=True):
            with memoryview(data) as view:
                copy_in(self._manager.store, block, view)
        self._tiers.num_hit_tokens += len(found) * self._layout.block_size
