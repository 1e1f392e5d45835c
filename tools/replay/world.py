"""A simulated fleet: the production actors, on a virtual clock and a simulated network, in one process.

Directory, routers with their scripts, KV managers with their prefix caches, engines with their schedulers: all of it
is what runs in a fleet. Only the model is a cost model, pages take the time that was measured, and so do messages.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import msgspec

from callboard.actors.actor import Actor, start_actor, stop_actor
from callboard.actors.directory import Directory
from callboard.actors.engine.engine import Engine
from callboard.actors.engine.simulated import Simulation
from callboard.actors.kv_manager import KvManager
from callboard.bus import BusError, Node, Ref, VirtualClock
from callboard.bus.errors import words_of
from callboard.bus.taps import TapRecord, finished
from callboard.bus.testing import run_virtual
from callboard.bus.transports.sim import SimHub, Weather
from callboard.kv.lanes import Pace
from callboard.kv.layout import KvLayout
from callboard.router.actor import RouterActor
from callboard.tools.errors import CliError
from callboard.tools.trace.event import Event, event_of

from .costs import Costs, Pages
from .shape import CONTROL, EngineShape, ManagerShape, RouterShape, Shape

T = TypeVar("T")
FLEET = "replay"
START_S = 60.0
BEGIN_S = 1.0
"""When it is ready: engines report their loads at times that count from their start."""
NUM_LAYERS = 4
"""Of the simulated KV: as many as engines report a step's layers in groups, so that pages leave as early."""
LAYOUT = KvLayout(NUM_LAYERS, 1, 2)
"""The least that a simulated slot needs. What it holds is of no interest, how long it takes to move is measured."""
MOST_VOCAB = 1 << 22


class MeasuredPace(Pace):
    """Pages that take as long as they took where they were recorded."""

    def __init__(self, pages: Pages, byte_scale: float) -> None:
        self._pages = pages
        self._byte_scale = byte_scale

    def piece_bytes(self, layout: KvLayout) -> int:
        return 1 << 40  # All of a send at once: that is what was measured.

    async def take(self, copy: Callable[[], int]) -> int:
        num_bytes = copy()
        await asyncio.sleep(self._pages.seconds_per_send + num_bytes * self._byte_scale / self._pages.bytes_per_s)
        return num_bytes


class _Manager(KvManager):
    """A KV manager whose pages take their time."""

    def __init__(self, config: KvManager.Config, costs: Costs, byte_scale: float) -> None:
        super().__init__(config)
        self._costs = costs
        self._byte_scale = byte_scale

    def pace(self, to: str) -> Pace:
        return MeasuredPace(self._costs.pages_of(self.name, to), self._byte_scale)


class World:
    """A fleet of a shape, while it runs. ``follow`` hears of every record of every node, on the one clock there is."""

    def __init__(
        self,
        shape: Shape,
        costs: Costs,
        *,
        seed: int,
        vocab_size: int,
        client: str = CONTROL,
        follow: Callable[[Event], None],
    ) -> None:
        self.shape = shape
        self.layout = msgspec.structs.replace(LAYOUT, block_size=shape.block_size)
        self.byte_scale = (shape.token_bytes or self.layout.token_bytes) / self.layout.token_bytes
        """What a byte moved here stands for."""
        self.client: Node
        self.crashes: list[str] = []
        """Actors that broke, and how."""
        self._client = client
        self._costs = costs
        self._seed = seed
        self._follow = follow
        self._vocab_size = vocab_size
        # Always the same delay: the order of messages is then that of what causes them.
        self._hub = SimHub(seed, weather=Weather(costs.latency_s, costs.latency_s), is_one_host=True)
        self._nodes: dict[str, Node] = {}
        self._stack = AsyncExitStack()
        self._routers: list[RouterActor] = []

    async def __aenter__(self) -> "World":
        await self._stack.__aenter__()
        shape = self.shape
        control = await self._node(CONTROL)
        # As where it was recorded: who asks on the router's node does so without the network.
        self.client = await self._node(self._client)
        directory = await self._start(control, "directory", Directory(), None)
        pools, managers = {manager.name: manager for manager in shape.managers}, {}
        for engine in shape.engines:
            name = engine.manager
            if name not in managers:
                managers[name] = await self._start_manager(pools[name], directory)
            await self._start_engine(engine, managers[name], directory)
        for router in shape.routers:
            self._routers.append(await self._start_router(router, directory))
        async with asyncio.timeout(START_S):
            for actor in self._routers:
                await actor.view.wait_for(
                    lambda view: sum(entry.kind == "engine" for entry in view.entries) == len(shape.engines)
                )
        await asyncio.sleep(BEGIN_S - self.client.clock.now())
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.__aexit__(*error)

    def router(self, name: str) -> Ref:
        """Return a router by its name where it was recorded, or the one that there is."""
        names = [router.name for router in self.shape.routers]
        found = self.shape.routers[names.index(name) if name in names else 0]
        return self.client.ref(self._nodes[found.node].address_of(found.name))

    # ---- starting ------------------------------------------------------------------------------------------------

    async def _node(self, name: str) -> Node:
        node = self._nodes.get(name)
        if node is None:
            node = Node(
                name,
                endpoint=f"sim://{name}",
                transport=self._hub.transport(),
                fleet=FLEET,
                clock=VirtualClock(),
                seed=self._seed,
                on_crash=lambda actor, error: self.crashes.append(f"{actor} broke: {words_of(error)}"),
            )
            follow = self._follow
            node.follow(lambda row, _, name=name: follow(event_of(TapRecord(*finished(row)), name)))  # type: ignore[misc]
            node.trace.keep = 1
            self._nodes[name] = await self._stack.enter_async_context(node)
        return node

    async def _start(self, node: Node, name: str, actor: Actor, directory: Ref | None) -> Ref:
        own = None if directory is None else node.ref(directory.address)
        ref = await start_actor(node, name, actor, directory=own)
        self._stack.push_async_callback(stop_actor, actor)
        return ref

    async def _start_manager(self, shape: ManagerShape, directory: Ref) -> Ref:
        node = await self._node(shape.node)
        config = KvManager.Config(shape.name, self.layout, shape.num_blocks, lease_s=10.0)
        return await self._start(node, shape.name, _Manager(config, self._costs, self.byte_scale), directory)

    async def _start_engine(self, shape: EngineShape, manager: Ref, directory: Ref) -> None:
        node = await self._node(shape.node)
        like = Simulation(
            num_layers=self.layout.num_layers,
            num_kv_heads=self.layout.num_kv_heads,
            head_dim=self.layout.head_dim,
            vocab_size=self._vocab_size,
            max_model_len=shape.max_model_len or 1 << 20,
        )
        config = Engine.Config(
            name=shape.name,
            manager=manager.address,
            model=shape.model,
            roles=shape.roles,
            device=shape.device,
            runner="simulated",
            block_size=self.shape.block_size,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            max_num_seqs=shape.max_num_seqs,
            simulated=self._costs.of(shape.name).simulation(like),
        )
        await self._start(node, shape.name, Engine(config), directory)

    async def _start_router(self, shape: RouterShape, directory: Ref) -> RouterActor:
        node = await self._node(shape.node)
        config = RouterActor.Config(
            name=shape.name,
            script=shape.script,
            options=shape.options,
            deadline_s=shape.deadline_s,
            max_queue=shape.max_queue,
        )
        actor = RouterActor(config)
        await self._start(node, shape.name, actor, directory)
        return actor


def run_world(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``main()`` on virtual time. Raises CliError where nothing can happen any more."""
    try:
        return run_virtual(main)
    except (BusError, TimeoutError) as error:
        raise CliError(f"the simulated fleet does not start: {error or 'its engines do not come'}") from None
