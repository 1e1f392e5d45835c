"""Two KV managers, an engine of real bytes at each, and what tests ask of them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from callboard.actors.actor import Actor, start_actor, stop_actor
from callboard.actors.kv_manager import KvManager
from callboard.actors.protocol import (
    Abort,
    Admit,
    Attach,
    Attached,
    ComputeKv,
    Done,
    Finish,
    GetKvStats,
    Give,
    KvAddr,
    KvComputed,
    KvStats,
    LayersDone,
    PrepRecv,
    Recall,
    RemoteSend,
    Reserved,
)
from callboard.bus import FOREVER, Clock, Node, Ref, VirtualClock
from callboard.bus.testing import run_virtual
from callboard.bus.transports.inproc import InprocHub
from callboard.kv.lanes import WIRES, open_pool
from callboard.kv.layout import KvLayout
from callboard.kv.tokens import pack_tokens, unpack_tokens

LAYOUT = KvLayout(num_layers=3, num_kv_heads=1, head_dim=2, block_size=4)
PROMPT = [7, 3, 9, 4, 1, 8, 2, 6, 5, 7, 7]


def kv_bytes(layer: int, half: int, position: int, token: int) -> bytes:
    """Return what the test engine computes for a token: a function of where and what it is."""
    return bytes([layer, half, position % 256, token % 256]) * 2


class Engine(Actor):
    """An engine of real bytes and no model; ``kv`` says what it computes."""

    def __init__(
        self, manager: Ref, chunk: int = 3, layout: KvLayout = LAYOUT, kv: Callable[..., bytes] = kv_bytes
    ) -> None:
        self.manager = manager
        self.chunk = chunk
        self.layout = layout
        self.kv = kv
        self.slab: list[int] = []
        self.store: Any = None
        self.num_computed = 0
        self.may_compute = asyncio.Event()
        self.may_compute.set()
        self.may_finish_abort = asyncio.Event()
        self.may_finish_abort.set()
        self.aborted: list[str] = []
        self.attached = asyncio.Event()
        self.tie: Any = None

    async def start(self) -> None:
        self.tie = self.spawn(self.attach())
        await self.attached.wait()

    async def attach(self) -> None:
        async with self.manager.stream(Attach("engine", self.layout, self.ref.address), timeout=FOREVER) as items:
            async for item in items:
                if isinstance(item, Attached):
                    self.store = await open_pool(item.pool_path, self.node.exchange)
                    self.attached.set()
                elif isinstance(item, Recall):
                    given, self.slab = self.slab[: item.num_blocks], self.slab[item.num_blocks :]
                    self.manager.tell(Give("engine", pack_tokens(given)))

    def compute(self, tokens: Sequence[int], table: Sequence[int], begin: int, end: int, layer: int) -> None:
        for position in range(begin, end):
            size = self.layout.block_size
            slot = table[position // size] * size + position % size
            for half in (0, 1):
                self.store.slot(layer, half, slot)[:] = self.kv(layer, half, position, tokens[position])

    async def on_compute_kv(self, message: ComputeKv) -> AsyncIterator[LayersDone | KvComputed]:
        tokens, table = unpack_tokens(message.tokens), unpack_tokens(message.block_table)
        for begin in range(message.num_cached_tokens, len(tokens), self.chunk):
            end = min(begin + self.chunk, len(tokens))
            await self.may_compute.wait()
            self.num_computed += end - begin
            for layer in range(3):
                self.compute(tokens, table, begin, end, layer)
                yield LayersDone(layer, layer + 1, begin, end)
        yield KvComputed(len(tokens) - message.num_cached_tokens, 0.0, 0.0)

    async def on_abort(self, message: Abort) -> Done:
        self.aborted.append(message.request_id)
        await self.may_finish_abort.wait()
        return Done()


class Fleet:
    """Two KV managers on two nodes, an engine at each on nodes of their own, and a client."""

    def __init__(self, clock: Clock | None) -> None:
        self.hub = InprocHub()
        self.clock = clock
        self.nodes: dict[str, Node] = {}
        self.actors: dict[str, Any] = {}

    async def node(self, name: str) -> Node:
        node = Node(name, endpoint=f"inproc://{name}", transport=self.hub.transport(), seed=1, clock=self.clock)
        self.nodes[name] = node
        await node.__aenter__()
        return node

    async def manager(self, name: str, **config: Any) -> Ref:
        settings = {"name": name, "layout": LAYOUT, "num_blocks": 16, **config}
        self.actors[name] = KvManager(KvManager.Config(**settings))
        return await start_actor(await self.node(name), name, self.actors[name])

    async def engine(self, node: str, manager: Ref, **options: Any) -> Engine:
        own = await self.node(node)
        self.actors[node] = engine = Engine(own.ref(manager.address), **options)
        await start_actor(own, "engine", engine)
        return engine

    def at(self, name: str) -> Ref:
        """Return the ref of a manager, as the client sees it."""
        return self.nodes["client"].ref(self.nodes[name].address_of(name))

    async def stats(self, name: str, *, recall: bool = False) -> KvStats:
        stats = await self.at(name).ask(GetKvStats(recall))
        assert stats.problems == ()
        return stats

    async def settle(self) -> None:
        for _ in range(60):
            await asyncio.sleep(0)


@asynccontextmanager
async def running(
    p_config: dict[str, Any] | None = None,
    d_config: dict[str, Any] | None = None,
    clock: Clock | None = None,
    wires: Callable[[str], Any] | None = None,
) -> AsyncIterator[Fleet]:
    fleet = Fleet(clock)
    if wires is not None:
        fleet.hub.exchange[WIRES] = wires
    await fleet.node("client")
    p, d = await fleet.manager("p", **(p_config or {})), await fleet.manager("d", **(d_config or {}))
    await fleet.engine("pe", p)
    await fleet.engine("de", d)
    try:
        yield fleet
    finally:
        for actor in reversed(fleet.actors.values()):
            await stop_actor(actor)
        for node in reversed(fleet.nodes.values()):
            await node.stop()


def in_virtual_time(**configs: Any) -> Callable[[Callable[[Fleet], Awaitable[None]]], Callable[[], None]]:
    """Run a test on a fleet whose clock jumps to whatever happens next."""

    def decorate(test: Callable[[Fleet], Awaitable[None]]) -> Callable[[], None]:
        async def main() -> None:
            async with running(clock=VirtualClock(), **configs) as fleet:
                await test(fleet)

        def run() -> None:
            run_virtual(main)

        run.__name__ = test.__name__
        return run

    return decorate


def prep(
    ids: Sequence[int], end: int | None = None, *, request_id: str = "r", attempt: int = 0, wait_s: float = 0.0
) -> PrepRecv:
    return PrepRecv(request_id, attempt, pack_tokens(ids), end, wait_s)


def send(
    reserved: Reserved,
    ids: Sequence[int],
    begin: int | None = None,
    end: int | None = None,
    *,
    request_id: str = "r",
    wait_s: float = 0.0,
) -> RemoteSend:
    begin = reserved.begin if begin is None else begin
    return RemoteSend(
        request_id, 0, pack_tokens(ids), reserved.kv, begin, reserved.end if end is None else end, "engine", wait_s
    )


def admit(ids: Sequence[int], kv: KvAddr | None = None, *, sequence_id: str = "s", wait_s: float = 0.0) -> Admit:
    return Admit("engine", sequence_id, pack_tokens(ids), kv, wait_s)


def finish(ids: Sequence[int], table: bytes, *, sequence_id: str = "s") -> Finish:
    return Finish("engine", sequence_id, pack_tokens(ids), table)


def is_in_place(fleet: Fleet, manager: str, ids: Sequence[int], table: Sequence[int], begin: int, end: int) -> bool:
    """Return whether a pool holds the KV of these tokens."""
    store = fleet.actors[manager].store
    return all(
        store.slot(layer, half, table[i // 4] * 4 + i % 4) == kv_bytes(layer, half, i, ids[i])
        for layer in range(3)
        for half in (0, 1)
        for i in range(begin, end)
    )
