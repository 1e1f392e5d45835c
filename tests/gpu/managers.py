"""Pages between the pools of two KV managers on one GPU: one manager is this process's, the other a process of its own.

What is sent is cached already, so no engine takes part. What arrives is read through a third mapping of the pool and
held against a conversion by torch on the CPU. Then the receiving process is killed in the middle of a large send.
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch
from real_fleet import RealFleet, real_fleet

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.kv_manager import KvManager
from callboard.actors.node_spec import ActorSpec
from callboard.actors.protocol import PrepRecv, RemoteSend
from callboard.bus import BusError, Node, Ref
from callboard.kv.device_store import DeviceStore
from callboard.kv.lanes import PageWrite
from callboard.kv.layout import KvLayout, SlotRun
from callboard.kv.page_store import PageStore
from callboard.kv.pool_socket import fetch_pool
from callboard.kv.tokens import pack_tokens

SMALL = KvLayout(num_layers=4, num_kv_heads=2, head_dim=32, block_size=16, dtype="bfloat16")
LARGE = KvLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
UNLIKE = msgspec.structs.replace(SMALL, block_size=8, dtype="float32")
NUM_TOKENS = 200


def tensor_of(store: PageStore) -> torch.Tensor:
    """Return a pool's contents, on the CPU, as [num_layers, 2, num_slots, num_kv_heads, head_dim]."""
    if isinstance(store, DeviceStore):
        data = bytearray(store.num_blocks * store.layout.block_bytes)
        store.copy_out(0, memoryview(data))
    else:
        data = bytearray(store.view)
    flat = torch.frombuffer(data, dtype=getattr(torch, store.layout.dtype))
    return flat.view(store.layout.pool_shape(store.num_blocks)).flatten(2, 3)


def set_contents(store: PageStore, values: torch.Tensor) -> None:
    """Write a pool's contents."""
    data = memoryview(bytearray(values.contiguous().view(torch.uint8).numpy().tobytes()))
    if isinstance(store, DeviceStore):
        store.copy_in(0, data)
    else:
        store.view[: len(data)] = data


class Two:
    """The manager ``p`` here, and ``d`` in a process of its own."""

    def __init__(self, fleet: RealFleet, sender: KvManager, client: Node) -> None:
        self.fleet, self.sender, self.client = fleet, sender, client
        self.p: Ref = client.ref(sender.ref.address)
        self.d: Ref = client.ref(fleet.address("d", "d"))

    def remember(self, tokens: list[int], values: torch.Tensor) -> list[int]:
        """Have the KV of a prompt in p's cache; return its slots."""
        set_contents(self.sender.store, values)
        blocks, packed = self.sender.blocks, pack_tokens(tokens)
        blocks.attach("engine", "1")
        table = blocks.admit("engine", "s", packed).block_table
        blocks.finish("engine", "s", packed, table)
        return slots_of([SlotRun(block * self.size, self.size) for block in table], len(tokens))

    @property
    def size(self) -> int:
        return self.sender.config.layout.block_size

    async def send(self, tokens: list[int], end: int) -> tuple[Any, Any]:
        """Send the KV of ``tokens[:end]``; return what was reserved, and what was said."""
        reserved = await self.d.ask(PrepRecv("r", 0, pack_tokens(tokens), end))
        message = RemoteSend("r", 0, pack_tokens(tokens), reserved.kv, 0, end, "engine")
        return reserved, await self.p.ask(message, timeout=60)


def slots_of(runs: Any, count: int) -> list[int]:
    """Return the first slots of runs, one by one."""
    return [slot for run in runs for slot in range(run.slot, run.slot + run.count)][:count]


async def two(folder: Path, device: str, layout: KvLayout, target: KvLayout, num_blocks: int, use: Any) -> Any:
    """Start both, and use them."""
    async with real_fleet(folder) as fleet, Node("p", endpoint=fleet.address("p", "p").endpoint, fleet="test") as node:
        config: dict[str, Any] = {"device": device, "socket_dir": str(folder / "pools")}
        sender = KvManager(KvManager.Config(name="p", layout=layout, num_blocks=num_blocks, **config))
        await start_actor(node, "p", sender)
        size = target.block_size
        there = {"layout": msgspec.to_builtins(target), "num_blocks": num_blocks * layout.block_size // size}
        manager = ActorSpec("d", "callboard.actors.kv_manager:KvManager", {"name": "d", **there, **config})
        num_bytes = None if device != "cpu" else target.block_bytes * there["num_blocks"]
        await fleet.start(fleet.directory())
        await fleet.start(fleet.node("d", "kv_manager", manager, pool_bytes=num_bytes))
        try:
            return await use(Two(fleet, sender, fleet.client))
        finally:
            await stop_actor(sender)


async def arrives(folder: Path, device: str, target: KvLayout) -> dict[str, Any]:
    """Send a prompt's KV, and look at what has arrived."""
    lane = "shm" if device == "cpu" else "cuda_ipc"

    async def use(both: Two) -> dict[str, Any]:
        torch.manual_seed(0)
        shape = SMALL.pool_shape(32)
        values = torch.randn(shape).to(torch.bfloat16)
        tokens = list(range(NUM_TOKENS))
        there = both.remember(tokens, values)[: NUM_TOKENS - 24]
        reserved, sent = await both.send(tokens, len(there))
        store = await fetch_pool(str(folder / "pools" / "d.pool"))
        came = tensor_of(store)[:, :, slots_of(reserved.kv.slots, len(there))]
        store.close()
        expected = values.flatten(2, 3)[:, :, there].to(came.dtype)
        num_bytes = len(there) * target.token_bytes
        return {
            "test": f"pages of {SMALL.dtype} arrive as {target.dtype} in blocks of {target.block_size} on {device}",
            "holds": bool(torch.equal(came, expected)) and sent.lane == lane and sent.num_bytes == num_bytes,
            "lane": sent.lane,
            "bytes": sent.num_bytes,
        }

    result: dict[str, Any] = await two(folder, device, SMALL, target, 32, use)
    return result


async def survives_death(folder: Path, device: str, num_blocks: int) -> dict[str, Any]:
    """Kill the receiver while much is sent to it: the send must end, and every block of the sender's come back."""
    row: dict[str, Any] = {"test": f"a receiver killed in the middle of a send leaves nothing behind on {device}"}

    async def use(both: Two) -> dict[str, Any]:
        tokens = list(range(num_blocks * 16 - 16))
        blocks, packed = both.sender.blocks, pack_tokens(tokens)
        blocks.attach("engine", "1")
        table = blocks.admit("engine", "s", packed).block_table
        blocks.finish("engine", "s", packed, table)
        reserved = await both.d.ask(PrepRecv("r", 0, packed))
        sending = asyncio.ensure_future(
            both.p.ask(RemoteSend("r", 0, packed, reserved.kv, 0, len(tokens) - 16, "engine"), timeout=30)
        )
        while not both.sender._sender.lanes() and not sending.done():
            await asyncio.sleep(0)
        await both.fleet.kill("d")
        try:
            row["sent"] = (await sending).num_bytes
        except BusError as error:
            row["ended"] = type(error).__name__
        async with asyncio.timeout(20):
            while (counts := blocks.counts()).free + counts.cached != num_blocks:
                await asyncio.sleep(0.01)
        # And the GPU still works for the sender: a page goes from one place of its pool to another.
        here, there = SlotRun(0, 16), SlotRun(16, 16)
        pages = PageWrite("r", "e", "w", 0, 16, range(1), (here,), (there,))
        moved = await both.sender.own_lane.write(both.sender.store, pages)
        row["holds"] = not blocks.check_integrity() and moved == 2 * 16 * LARGE.slot_bytes
        return row

    try:
        result: dict[str, Any] = await two(folder, device, LARGE, LARGE, num_blocks, use)
    except TimeoutError:
        return {**row, "holds": False, "problem": "it has not ended, or blocks are missing"}
    return result


def rows(device: str = "cuda:0") -> list[dict[str, Any]]:
    """Return what was found."""
    found = []
    for target in (SMALL, UNLIKE):
        with tempfile.TemporaryDirectory() as folder:
            found.append(asyncio.run(arrives(Path(folder), device, target)))
    with tempfile.TemporaryDirectory() as folder:
        found.append(asyncio.run(survives_death(Path(folder), device, 64 if device == "cpu" else 2048)))
    return found
