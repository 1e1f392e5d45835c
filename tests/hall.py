"""Two KV managers and an engine at each, in processes one of which can be paused and killed: the virtual clock."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from two_managers import LAYOUT, PROMPT, Engine, admit, kv_bytes, prep, send

from callboard.actors.actor import Actor, start_actor, stop_actor
from callboard.actors.kv_manager import KvManager
from callboard.actors.protocol import GetKvStats, KvStats, Reserved
from callboard.bus import Node, Ref, VirtualClock
from callboard.bus.links import LinkConfig
from callboard.bus.testing import SimulatedProcess, run_virtual
from callboard.bus.transports.sim import SimHub
from callboard.kv.tokens import unpack_tokens

LEASE_S = 1.0
OTHER = [90 + i for i in range(11)]
LINKS = LinkConfig(ping_s=0.25, silent_s=1.0)


class Hall:
    """Manager ``d`` with room for two prompts, and ``p`` in a process that can be paused, each with an engine."""

    def __init__(self) -> None:
        self.hub = SimHub(3)
        self.writer = SimulatedProcess("p")
        self.stops: dict[str, Callable[[], Awaitable[None]]] = {}
        self.actors: dict[str, Any] = {}
        self.client: Node

    async def start(self) -> None:
        self.client = await self._node("client")
        for name in ("d", "p"):
            await self._start(self.writer if name == "p" else SimulatedProcess(name), name)
            await self._start(SimulatedProcess(f"{name}e"), f"{name}e")

    async def stop(self) -> None:
        self.writer.resume()
        for stop in reversed(self.stops.values()):
            await stop()
        await self.client.stop()

    def at(self, name: str) -> Ref:
        return self.client.ref(self.actors[name].ref.address)

    async def stats(self, name: str) -> KvStats:
        return await self.at(name).ask(GetKvStats())

    async def half_written(self) -> Reserved:
        """Begin a send from p to d; return when some of its pages have arrived, and p stands still."""
        reserved = await self.at("d").ask(prep(PROMPT))
        asking = asyncio.ensure_future(self.at("p").ask(send(reserved, PROMPT), timeout=1000))
        asking.add_done_callback(lambda done: done.exception())
        slot = reserved.kv.slots[0].slot
        while self.actors["d"].store.slot(1, 0, slot) != kv_bytes(1, 0, 0, PROMPT[0]):
            await asyncio.sleep(10e-6)
        self.writer.pause()
        return reserved

    def pages(self, reserved: Reserved) -> bytes:
        """Return the bytes of a reservation's slots."""
        store = self.actors["d"].store
        return b"".join(
            store.slot(layer, half, slot)
            for layer in range(3)
            for half in (0, 1)
            for run in reserved.kv.slots
            for slot in range(run.slot, run.slot + run.count)
        )

    async def lend(self, sequence_id: str) -> list[int]:
        """Lend three blocks to d's engine, and have it write the KV of OTHER into them."""
        admitted = await self.at("d").ask(admit(OTHER, sequence_id=sequence_id))
        table = unpack_tokens(admitted.block_table)
        for layer in range(3):
            self.actors["de"].compute(OTHER, table, 0, len(OTHER), layer)
        return table

    async def restart_writer(self) -> None:
        """Start p anew, its process having been killed."""
        del self.stops["p"], self.stops["pe"]
        self.writer = SimulatedProcess("p again")
        await self._start(self.writer, "p", seed=2)

    async def _start(self, process: SimulatedProcess, name: str, *, seed: int = 1) -> None:
        async def start() -> Node:
            node = await self._node(name, seed)
            self.actors[name] = actor = self._make(name)
            await start_actor(node, name, actor)
            return node

        async def stop() -> None:
            await stop_actor(self.actors[name])
            await node.stop()

        node = await process.spawn(start())
        self.stops[name] = lambda: process.spawn(stop())

    async def _node(self, name: str, seed: int = 1) -> Node:
        transport = self.hub.transport()
        node = Node(name, endpoint=f"sim://{name}", transport=transport, seed=seed, clock=VirtualClock(), links=LINKS)
        await node.__aenter__()
        return node

    def _make(self, name: str) -> Actor:
        if name.endswith("e"):
            return Engine(self.client.ref(self.actors[name[0]].ref.address))
        return KvManager(KvManager.Config(name, LAYOUT, 6 if name == "d" else 16, lease_s=LEASE_S))


def in_a_hall(test: Callable[[Hall], Awaitable[None]]) -> None:
    async def main() -> None:
        hall = Hall()
        await hall.start()
        try:
            await test(hall)
        finally:
            await hall.stop()

    run_virtual(main)
