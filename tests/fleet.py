"""A fleet in one process, of the production actors over the in-process transport, for tests."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from waiting import PATIENCE_S

from callboard.actors.actor import Actor, start_actor, stop_actor
from callboard.actors.directory import Directory
from callboard.actors.engine.engine import Engine
from callboard.actors.kv_manager import KvManager
from callboard.actors.protocol import (
    Generate,
    GetKvStats,
    GetSubRequests,
    KvStats,
    SamplingParams,
    SubRequest,
    Token,
    Usage,
)
from callboard.actors.trace_protocol import TRACER
from callboard.actors.tracer import Tracer
from callboard.bus import Clock, Node, Ref
from callboard.bus.transports.inproc import InprocHub
from callboard.kv.layout import KvLayout
from callboard.kv.tokens import pack_tokens
from callboard.router.actor import RouterActor


@dataclass
class Generated:
    """What one request brought."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None


class Fleet:
    """Nodes and actors of one fleet, and a client's view of it."""

    def __init__(self, hub: InprocHub, stack: AsyncExitStack, clock: Clock | None, seed: int) -> None:
        self.hub, self.stack, self.clock, self.seed = hub, stack, clock, seed
        self.nodes: dict[str, Node] = {}
        self.actors: dict[str, Actor] = {}
        self.managers: dict[str, Ref] = {}
        self.tracers: dict[str, Tracer] = {}
        self.client: Node
        self.router: Ref
        self._num_requests = 0

    async def node(self, name: str) -> Node:
        node = Node(
            name,
            endpoint=f"inproc://{name}",
            transport=self.hub.transport(),
            fleet="test",
            clock=self.clock,
            seed=self.seed,
        )
        self.nodes[name] = await self.stack.enter_async_context(node)
        self.tracers[name] = Tracer()
        await start_actor(node, TRACER, self.tracers[name])
        self.stack.push_async_callback(stop_actor, self.tracers[name])
        return node

    async def start(self, node: Node, name: str, actor: Actor, directory: Ref | None) -> Ref:
        ref = await start_actor(node, name, actor, directory=directory)
        self.stack.push_async_callback(stop_actor, actor)
        self.actors[name] = actor
        return self.client.ref(ref.address)

    async def generate(
        self, prompt: list[int], sampling: SamplingParams | None = None, *, request_id: str = "", **options: Any
    ) -> Generated:
        """Ask the router for one sequence and collect it; positions must be consecutive."""
        if not request_id:
            self._num_requests += 1
            request_id = f"request-{self._num_requests}"
        message = Generate(request_id, "tiny", pack_tokens(prompt), sampling or SamplingParams(), **options)
        result = Generated()
        async with self.router.stream(message, timeout=120) as tokens:
            async for token in tokens:
                assert isinstance(token, Token)
                assert token.position == len(result.tokens)
                result.tokens.append(token.id)
                result.finish_reason, result.usage = token.finish_reason, token.usage
        return result

    async def sub_requests(self, request_id: str | None = None) -> list[SubRequest]:
        return list((await self.router.ask(GetSubRequests(request_id))).items)

    async def stats(self, manager: str) -> KvStats:
        return await self.managers[manager].ask(GetKvStats(recall=True))

    async def assert_nothing_leaks(self) -> None:
        """Wait until every block is free or cached, and check the integrity of pools and caches."""
        async with asyncio.timeout(PATIENCE_S):
            for name in self.managers:
                while True:
                    stats = await self.stats(name)
                    assert not stats.problems, stats.problems
                    if stats.free + stats.cached == stats.num_blocks and not stats.num_reservations:
                        break
                    await asyncio.sleep(0.02)
                assert stats.quarantined == 0


def roles_of(name: str) -> tuple[str, ...]:
    return {"p": ("prefill",), "d": ("decode",)}.get(name[0], ("prefill", "decode"))


@asynccontextmanager
async def running_fleet(
    *,
    layout: KvLayout,
    model: Path | str = "",
    engines: tuple[str, ...] = ("p", "d"),
    script: str = "disaggregate",
    options: dict[str, Any] | None = None,
    num_blocks: int = 256,
    hub: InprocHub | None = None,
    clock: Clock | None = None,
    seed: int = 0,
    lease_s: float = 10.0,
    is_shared: bool = False,
    has_own_directory: bool = False,
    hung_s: float = 0.0,
    layouts: dict[str, KvLayout] | None = None,
    **engine_options: Any,
) -> AsyncIterator[Fleet]:
    """Start directory, router, and an engine per name (p...: prefill, d...: decode, others: both).

    Each engine has a KV manager of its own, ``kv-NAME``; with ``is_shared`` all of them share ``kv``, as on one device.
    ``layouts`` are those of engines, by name, whose KV is laid out otherwise than by ``layout``.
    With ``has_own_directory`` the directory is alone on the node ``directory``, else beside the router on ``control``.
    With ``hung_s`` a watchdog looks after the router's scripts.
    """
    async with AsyncExitStack() as stack:
        fleet = Fleet(hub or InprocHub(), stack, clock, seed)
        fleet.client = await fleet.node("client")
        control = await fleet.node("control")
        directory_node = await fleet.node("directory") if has_own_directory else control
        directory = await fleet.start(directory_node, "directory", Directory(), None)
        for name in engines:
            own_layout = (layouts or {}).get(name, layout)
            kv_name = "kv" if is_shared else f"kv-{name}"
            if kv_name not in fleet.managers:
                kv_node = await fleet.node(kv_name)
                manager = KvManager(
                    KvManager.Config(
                        name=kv_name,
                        layout=own_layout,
                        num_blocks=num_blocks,
                        device="cpu",
                        lease_s=lease_s,
                        fingerprint="tiny",
                    )
                )
                own_directory = kv_node.ref(directory.address)
                fleet.managers[kv_name] = await fleet.start(kv_node, kv_name, manager, own_directory)
            ref = fleet.managers[kv_name]
            engine_node = await fleet.node(name)
            config = Engine.Config(
                name=name,
                model="tiny",
                fingerprint="tiny",
                path=str(model),
                roles=roles_of(name),
                manager=ref.address,
                runner="transformers" if model else "simulated",
                dtype=own_layout.dtype,
                block_size=own_layout.block_size,
                **engine_options,
            )
            await fleet.start(engine_node, name, Engine(config), engine_node.ref(directory.address))
        router = RouterActor(RouterActor.Config(name="main", script=script, options=options or {}, hung_s=hung_s))
        fleet.router = await fleet.start(control, "main", router, control.ref(directory.address))
        async with asyncio.timeout(PATIENCE_S):
            await router.view.wait_for(lambda view: sum(each.kind == "engine" for each in view.entries) == len(engines))
        yield fleet


async def at_once(
    generate: Callable[..., Awaitable[Generated]], work: list[tuple[list[int], SamplingParams]]
) -> list[Generated]:
    """Generate all of them together; return what each brought, in order."""
    return list(await asyncio.gather(*(generate(prompt, sampling) for prompt, sampling in work)))
