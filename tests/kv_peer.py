"""KV managers in two processes: this one, and a child that does what a test tells it to, and dies when it is told."""

import asyncio
import hashlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from waiting import PATIENCE_S

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.kv_manager import KvManager
from callboard.actors.protocol import Done, GetKvStats, KvStats, PrepRecv, RemoteSend, Reserved, TakePages
from callboard.bus import Address, Ask, LinkConfig, LinkLost, Message, Node, Ref
from callboard.kv.lanes import ucx
from callboard.kv.layout import KvLayout, SlotRun
from callboard.kv.packed_form import packed_bytes
from callboard.kv.packing import pack
from callboard.kv.page_store import PageStore
from callboard.kv.slots import num_slots
from callboard.kv.tokens import pack_tokens

LAYOUT = KvLayout(num_layers=8, num_kv_heads=4, head_dim=128, block_size=16)
NUM_BLOCKS = 48
LINKS = LinkConfig(ping_s=0.1, silent_s=0.6)


def load_ucx() -> None:
    """Load the library, if it is there, before a node has to answer pings."""
    if ucx.is_installed():
        ucx._load()


class Start(msgspec.Struct):
    """What the child is told at its start."""

    name: str
    folder: str
    dies_at: int = 0
    """The number of the piece at whose announcement it ends itself, by ``signal``; 0: it does not."""
    signal: int = signal.SIGKILL
    transport: str = "ucx"


class Remember(Ask[Done], frozen=True):
    """Have the KV of a prompt in the cache, of bytes that follow from ``seed``."""

    prompt: bytes
    seed: int


class Digest(Message, frozen=True):
    value: bytes
    num_lent: int
    """Staging buffers that are out."""


class GetDigest(Ask[Digest], frozen=True):
    """Say what lies in these slots."""

    slots: tuple[SlotRun, ...]


class Mortal(KvManager):
    """Ends a process, its own or another, when so many pieces have been announced to it."""

    def __init__(self, config: KvManager.Config, dies_at: int = 0, sent: int = signal.SIGKILL, pid: int = 0) -> None:
        super().__init__(config)
        self.num_announced = 0
        self.dies_at = dies_at
        self.signal = sent
        self.pid = pid

    async def on_take_pages(self, message: TakePages) -> Done:
        self.num_announced += 1
        if self.num_announced == self.dies_at:
            os.kill(self.pid or os.getpid(), self.signal)
        return await super().on_take_pages(message)

    def num_lent(self) -> int:
        """Return how many staging buffers are out, on either side of its lanes."""
        lines = self._receiver._lines.values()
        peers = self._sender._peers._peers.values()
        lanes: list[Any] = [p.ready.result() for p in peers if p.ready.done() and not p.ready.exception()]
        return sum(line.staging.num_lent for line in lines) + sum(lane.staging.num_lent for lane in lanes)


class Hand:
    """Reaches into a manager's pool for a test."""

    def __init__(self, manager: Mortal) -> None:
        self.manager = manager

    def on_remember(self, message: Remember) -> Done:
        remember(self.manager, message.prompt, message.seed)
        return Done()

    def on_get_digest(self, message: GetDigest) -> Digest:
        return Digest(digest(self.manager.store, message.slots), self.manager.num_lent())


def remember(manager: KvManager, prompt: bytes, seed: int) -> tuple[int, ...]:
    """Have a prompt cached, as if an engine had computed it; return its blocks."""
    import numpy as np

    manager.blocks.attach("engine", "1")
    table = manager.blocks.admit("engine", f"s{seed}", prompt).block_table
    bits = np.random.default_rng(seed).integers(0, 256, LAYOUT.block_bytes, np.uint8)
    for number, block in enumerate(table):
        rows = np.frombuffer(manager.store.view, np.uint8).reshape(2 * LAYOUT.num_layers, NUM_BLOCKS, -1)
        rows[:, block] = bits.reshape(2 * LAYOUT.num_layers, -1) + np.uint8(number % 251)
        del rows
    manager.blocks.finish("engine", f"s{seed}", prompt, table)
    return table


def digest(store: PageStore, slots: Sequence[SlotRun]) -> bytes:
    """Return a digest of all that lies in some slots."""
    out = memoryview(bytearray(packed_bytes(LAYOUT, num_slots(slots), LAYOUT.num_layers, LAYOUT.dtype)))
    if not slots:
        return b""
    pack(store, slots, range(LAYOUT.num_layers), out, wire_dtype=LAYOUT.dtype)
    return hashlib.blake2b(out).digest()


def config(name: str, folder: Path | str, transport: str = "ucx") -> KvManager.Config:
    return KvManager.Config(name, LAYOUT, NUM_BLOCKS, socket_dir=f"{folder}/pools", transport=transport)


class Pair:
    """The manager ``here`` and its peer in the child, as a client of both sees them."""

    def __init__(self, folder: Path, node: Node, client: Node, manager: Mortal, child: str) -> None:
        self.folder = folder
        self.node = node
        self.manager = manager
        self.here = client.ref(manager.ref.address)
        self.there = client.ref(address(folder, child, child))
        self.hand = client.ref(address(folder, child, "hand"))

    async def prepare(self, to: Ref, prompt: Sequence[int], request_id: str = "r", end: int | None = None) -> Reserved:
        return await to.ask(PrepRecv(request_id, 0, pack_tokens(prompt), end))

    async def send(self, sender: Ref, prompt: Sequence[int], reserved: Reserved, **options: Any) -> Any:
        message = RemoteSend("r", 0, pack_tokens(prompt), reserved.kv, reserved.begin, reserved.end, "engine")
        return await sender.ask(message, **options)


def address(folder: Path | str, node: str, actor: str) -> Address:
    return Address(node, f"ipc://{folder}/{node}.sock", actor)


async def settled(ref: Ref, holds: Any = lambda stats: True) -> KvStats:
    """Wait until a manager's books are as they should be; return them."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                if holds(stats := await ref.ask(GetKvStats())):
                    break
            except LinkLost:
                pass  # It was stopped for so long that the link to it broke: the next question dials anew.
            await asyncio.sleep(0.01)
    assert stats.problems == ()
    return stats


@asynccontextmanager
async def running_child(start: Start) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the child; it is ready."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, msgspec.json.encode(start).decode(), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def running_pair(folder: Path, child: str = "there", **options: Any) -> AsyncIterator[Pair]:
    """Run the manager of this process; its peer in the child is started by who needs it."""
    (folder / "pools").mkdir(mode=0o700, exist_ok=True)
    load_ucx()
    async with (
        Node("here", endpoint=f"ipc://{folder}/here.sock", links=LINKS) as node,
        Node("client", links=LINKS) as client,
    ):
        manager = Mortal(config("here", folder), **options)
        await start_actor(node, "here", manager)
        try:
            yield Pair(folder, node, client, manager, child)
        finally:
            await stop_actor(manager)


async def main() -> None:
    start = msgspec.json.decode(sys.argv[1], type=Start)
    load_ucx()  # Which takes longer than a link may be silent here.
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    async with Node(start.name, endpoint=f"ipc://{start.folder}/{start.name}.sock", links=LINKS) as node:
        manager = Mortal(config(start.name, start.folder, start.transport), start.dies_at, start.signal)
        await start_actor(node, start.name, manager)
        node.add("hand", Hand(manager))
        print("ready", flush=True)
        await stop.wait()
        await stop_actor(manager)


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
