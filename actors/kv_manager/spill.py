"""Blocks on their way from the pool into a tier: written soon after they are cached, so that to evict them is free.

What is evicted before it was written is copied aside, as long as there is room for that; else it is lost, and counted.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from callboard.kv.tiers import BlockName, Bytes, DiskTier, HostTier, copy_out

from .pool_actor import PoolActor

MOST_STAGED = 64 << 20
"""Bytes of evicted blocks that wait for being written. To copy them keeps the loop for 10 ms in all."""
RETRY_S = 1.0
MOST_RETRY_S = 60.0
"""After a write that failed nothing is written for so long, twice as long after each further one."""


@dataclass(slots=True, eq=False)
class _Job:
    """A block to be written. ``block`` is where it is in the pool, None once it is not there any more."""

    name: BlockName
    block: int | None
    data: Bytes | None = None
    pieces: Iterator[int] | None = None
    is_staged: bool = False


class Spill:
    """Writes blocks into one tier, one at a time.

    ``put`` writes one, and may raise OSError; ``find`` returns the bytes of a block that are at hand elsewhere.
    """

    def __init__(
        self,
        manager: PoolActor,
        put: Callable[[BlockName, Bytes], Awaitable[None]],
        find: Callable[[BlockName], Bytes | None],
    ) -> None:
        self.num_dropped = 0
        """Blocks that were evicted, or failed to be written, and are in no tier."""
        self._manager = manager
        self._block_bytes = manager.config.layout.block_bytes
        self._put = put
        self._find = find
        self._jobs: dict[bytes, _Job] = {}
        self._staged_bytes = 0
        self._wanted = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def add(self, name: BlockName, block: int) -> None:
        """Have a block written that was cached just now."""
        self.remove(name)
        self._jobs[name.key] = _Job(name, block)
        self._wanted.set()
        self._is_idle.clear()

    def remove(self, name: BlockName) -> None:
        """Have a block not written. A repeat does nothing."""
        job = self._jobs.pop(name.key, None)
        if job is not None:
            self._forget(job)

    def staged(self, name: BlockName) -> Bytes | None:
        """Return the bytes of a block that waits for being written and is in the pool no longer."""
        job = self._jobs.get(name.key)
        return job.data if job is not None and job.is_staged else None

    def evicting(self, name: BlockName, block: int) -> None:
        """Save the bytes of a block that is about to leave the pool, and is not in the tier (any more)."""
        job = self._jobs.get(name.key)
        if job is None:
            self.add(name, block)
            job = self._jobs[name.key]
        elif job.block is None:
            return
        if job.pieces is None and self._find(name) is None:
            if self._staged_bytes + self._block_bytes > MOST_STAGED:
                self.num_dropped += 1
                self.remove(name)
                return
            self._begin(job)
        for _ in job.pieces or ():
            pass
        job.block = None
        self._stage(job)

    def keep(self, name: BlockName, data: Bytes) -> None:
        """Take the bytes of a block that another tier gives up, if it waits for being written from there."""
        job = self._jobs.get(name.key)
        if job is None or job.block is not None or job.data is not None:
            return
        if self._staged_bytes + len(data) > MOST_STAGED:
            self.num_dropped += 1
            self.remove(name)
            return
        job.data = data
        self._stage(job)

    async def run(self, tier: HostTier | DiskTier) -> None:
        """Write for ever, and let the tier look around whenever it is time to."""
        retry_s = RETRY_S
        while True:
            if self._manager.node.clock.now() >= tier.refresh_at:
                await tier.refresh()
            if not self._jobs:
                self._is_idle.set()
                self._wanted.clear()
                await self._wait(tier.refresh_at)
                continue
            job = next(iter(self._jobs.values()))
            data = await self._bytes_of(job)
            if self._jobs.get(job.name.key) is not job:
                continue  # It was taken back meanwhile.
            try:
                if data is not None:
                    await self._put(job.name, data)
                retry_s = RETRY_S
            except OSError:
                self.num_dropped += 1
                await self._manager.node.clock.sleep(retry_s)
                retry_s = min(2 * retry_s, MOST_RETRY_S)
            if self._jobs.get(job.name.key) is job:
                self.remove(job.name)

    async def flush(self, seconds: float) -> None:
        """Wait until nothing is left to be written, but not longer."""
        try:
            async with asyncio.timeout(seconds):
                await self._is_idle.wait()
        except TimeoutError:
            pass

    async def _wait(self, until: float) -> None:
        seconds = max(0.0, until - self._manager.node.clock.now())
        try:
            async with asyncio.timeout(seconds if seconds < float("inf") else None):
                await self._wanted.wait()
        except TimeoutError:
            pass

    async def _bytes_of(self, job: _Job) -> Bytes | None:
        """Return a block's bytes, copied out of the pool piece by piece; None if they are nowhere any more."""
        if job.data is None:
            found = self._find(job.name)
            if found is not None or job.block is None:
                return found
            self._begin(job)
        for _ in job.pieces or ():
            await asyncio.sleep(0)
        return job.data

    def _begin(self, job: _Job) -> None:
        assert job.block is not None
        job.data = data = bytearray(self._block_bytes)
        job.pieces = copy_out(self._manager.store, job.block, data)

    def _stage(self, job: _Job) -> None:
        if job.data is not None:
            job.is_staged = True
            self._staged_bytes += len(job.data)

    def _forget(self, job: _Job) -> None:
        if job.is_staged:
            job.is_staged = False
            assert job.data is not None
            self._staged_bytes -= len(job.data)
