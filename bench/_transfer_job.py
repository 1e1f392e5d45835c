"""What every side of bench/transfer.py does: a job is some blocks of one pool that go to as many of another.

A side has two processes. The *near* one drives and is timed, the *far* one has what is at the other end. Both map the
same two pools, of which a lane may use what it could use in earnest. They take orders as lines of JSON on stdin
(``Job`` and, at the far end, an empty line after it) and answer each with a line.
"""

import asyncio
import mmap
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from callboard.kv.layout import KvLayout
from callboard.kv.page_store import PageStore

LAYOUT = KvLayout(num_layers=8, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
"""A group of 8 of the 32 layers of Llama-3.1-8B: pages of 32 KiB, 16 of them a block."""
PAGE_BYTES = LAYOUT.block_size * LAYOUT.slot_bytes
NUM_ROWS = 2 * LAYOUT.num_layers
"""Pages of a block."""
NUM_BLOCKS = int(os.environ.get("TRANSFER_BLOCKS", "1024"))
"""Of each pool: 512 MiB, two of the largest jobs. Tests have smaller ones."""
MIB = 1 << 20
POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE (linux/mman.h, since 5.14), which Python's mmap has no name for yet."""


class Job(msgspec.Struct):
    """``num_blocks`` blocks to move; which, if the side can choose them, follows from ``seed``."""

    num_blocks: int
    seed: int

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * LAYOUT.block_bytes

    def blocks(self) -> tuple[list[int], list[int]]:
        """Return scattered blocks of the source, and of the target."""
        rng = random.Random(self.seed)
        return rng.sample(range(NUM_BLOCKS), self.num_blocks), rng.sample(range(NUM_BLOCKS), self.num_blocks)


class Moved(msgspec.Struct):
    """How long a job took, from the order until all is in place and the near end knows it."""

    seconds: float
    cpu_s: float
    """Of this process, all threads."""
    blocks: tuple[list[int], list[int]] | None = None
    """Which blocks they were, if it was not for the job to choose."""
    whole_s: float = 0.0
    """With everything around it: the answer to remote_send."""
    num_bytes: int | None = None
    """Bytes moved, if not all of them."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a process of a side has: the pools' files, a directory, and what the far end said of itself."""

    side: str
    source_fd: int
    target_fd: int
    folder: str
    facts: str = ""

    def source(self) -> PageStore:
        return warm(PageStore.map(os.dup(self.source_fd), LAYOUT, NUM_BLOCKS))

    def target(self) -> PageStore:
        return warm(PageStore.map(os.dup(self.target_fd), LAYOUT, NUM_BLOCKS))


def warm(store: PageStore) -> PageStore:
    """Have every page of a mapping in this process's tables: first touches cost five times what copying does."""
    memory = store._memory
    assert isinstance(memory, mmap.mmap)
    try:
        memory.madvise(POPULATE_WRITE)
    except OSError:  # An older kernel.
        for page in range(0, len(store.view), mmap.PAGESIZE):
            store.view[page] = store.view[page]
    return store


def address(store: PageStore) -> int:
    """Return where a pool begins in this process."""
    return int(store.rows().ctypes.data)


def ready(facts: str = "") -> None:
    """Tell that the process takes orders now."""
    print("ready", facts, flush=True)


def order() -> Job | None:
    """Return the next order; None is the empty line that ends a job. Exits when there will be no more."""
    line = sys.stdin.readline()
    if not line:
        sys.exit()
    return msgspec.json.decode(line, type=Job) if line.strip() else None


def answer(moved: Moved) -> None:
    """Answer the last order."""
    print(msgspec.json.encode(moved).decode(), flush=True)


def follow_near(move: Callable[[Job], None]) -> None:
    """Do the jobs at the near end, with a function that returns when all is in place."""
    ready()
    while True:
        job = order()
        assert job is not None
        cpu_s, begin = time.process_time(), time.perf_counter()
        move(job)
        answer(Moved(time.perf_counter() - begin, time.process_time() - cpu_s))


def follow_far(receive: Callable[[Job], None]) -> None:
    """Do the jobs at the far end, which is ready, with a function that returns when all has been put in place."""
    while True:
        job = order()
        assert job is not None
        cpu_s = time.process_time()
        print("expecting", flush=True)
        receive(job)
        order()
        answer(Moved(0.0, time.process_time() - cpu_s))


async def next_order() -> Job | None:
    """Return the next order while the loop runs."""
    return await asyncio.get_running_loop().run_in_executor(None, order)


async def follow_near_async(move: Callable[[Job], Awaitable[Moved]]) -> None:
    """Do the jobs at the near end, with a coroutine that says what it found."""
    ready()
    while True:
        job = await next_order()
        assert job is not None
        answer(await move(job))


async def follow_far_async(facts: str) -> None:
    """Say what the far end spent on the jobs that it serves by itself."""
    ready(facts)
    while True:
        await next_order()
        cpu_s = time.process_time()
        print("expecting", flush=True)
        await next_order()
        answer(Moved(0.0, time.process_time() - cpu_s))
