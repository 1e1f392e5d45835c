"""An engine as far as its KV manager can tell: it has prompts of which all KV is in place, and adopts such."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from _transfer_job import LAYOUT, NUM_BLOCKS, Job

from callboard.actors.protocol import Admit, Attach, Finish, KvAddr
from callboard.bus import FOREVER, Node, Ref
from callboard.kv.tokens import pack_tokens, unpack_tokens

VOCAB = 100_000


class Engine:
    """Attached to ``manager`` under ``name`` while ``attached`` lasts."""

    def __init__(self, manager: Ref, name: str) -> None:
        self.name = name
        self._manager = manager

    async def scatter(self) -> None:
        """Have the pool's free blocks in no order."""
        tables = [await self.admit(pack_tokens([number]), f"one {number}") for number in range(NUM_BLOCKS)]
        order = list(range(NUM_BLOCKS))
        random.Random(7).shuffle(order)
        for number in order:
            self._manager.tell(Finish(self.name, f"one {number}", b"", pack_tokens(tables[number])))

    async def compute(self, prompt: bytes) -> list[int]:
        """Have the KV of a prompt cached; return its blocks. What it is was in them before."""
        table = await self.admit(prompt, "computed")
        self._manager.tell(Finish(self.name, "computed", prompt, pack_tokens(table)))
        return table

    async def admit(self, prompt: bytes, sequence_id: str, kv: KvAddr | None = None) -> list[int]:
        """Lease the blocks of a sequence, those of ``kv`` with the KV in them."""
        admitted = await self._manager.ask(Admit(self.name, sequence_id, prompt, kv))
        return list(unpack_tokens(admitted.block_table))

    def finish(self, prompt: bytes, sequence_id: str, table: list[int]) -> None:
        self._manager.tell(Finish(self.name, sequence_id, prompt, pack_tokens(table)))


@asynccontextmanager
async def attached(node: Node, manager: Ref, name: str = "engine") -> AsyncIterator[Engine]:
    """Attach an engine to a manager."""
    async with manager.stream(Attach(name, LAYOUT, manager.address), timeout=FOREVER) as items:
        await anext(items)
        reading = asyncio.ensure_future(_read(items))
        try:
            yield Engine(manager, name)
        finally:
            reading.cancel()


async def _read(items: AsyncIterator[object]) -> None:
    async for _ in items:
        pass  # It has no spare blocks to be recalled.


def new_prompt(job: Job) -> bytes:
    """Return a prompt that fills the job's blocks, and that nobody has cached."""
    rng = random.Random(job.seed)
    return pack_tokens([rng.randrange(VOCAB) for _ in range(job.num_blocks * LAYOUT.block_size)])
