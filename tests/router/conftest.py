"""A small fleet on a virtual clock: real actors on the bus that speak the protocol and note what they are asked."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any, Self

import pytest

from callboard.actors.actor import Actor, start_actor, stop_actor
from callboard.actors.directory import Directory, Registration
from callboard.actors.protocol import (
    Abort,
    Done,
    Entry,
    Generate,
    KvAddr,
    PrepRecv,
    Probe,
    Probed,
    Release,
    RemoteSend,
    Reserved,
    SamplingParams,
    Sent,
    StartGenerate,
    Token,
    Usage,
)
from callboard.bus import Address, Node, Ref, VirtualClock
from callboard.bus.testing import VirtualLoop
from callboard.bus.transports.inproc import InprocHub
from callboard.kv.layout import KvLayout
from callboard.kv.tokens import num_tokens, pack_tokens, unpack_tokens
from callboard.router.actor import RouterActor

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=8)


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"virtual": VirtualLoop}


class NotingManager(Actor):
    """A KV manager that has ``num_cached`` tokens of every prompt, and notes every message."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.num_cached = 0
        self.reserve_s = 0.0
        self.release_s = 0.0
        self.wait_s: float | None = None
        self.error: Exception | None = None
        self.reserved: dict[str, KvAddr] = {}
        self.num_made = 0

    async def on_prep_recv(self, message: PrepRecv) -> Reserved:
        self.calls.append(("prep_recv", message.request_id, message.attempt, message.end))
        self.wait_s = message.wait_s
        if self.error is not None:
            raise self.error
        end = num_tokens(message.prompt) if message.end is None else message.end
        self.num_made += 1
        reservation = f"r{self.num_made}"
        addr = KvAddr(self.ref.address, self.name, reservation, LAYOUT, min(self.num_cached, end), end, ())
        self.reserved[reservation] = addr
        await self.node.clock.sleep(self.reserve_s)
        return Reserved(addr, self.num_cached, end, self.num_cached)

    async def on_remote_send(self, message: RemoteSend) -> Sent:
        self.calls.append(("remote_send", message.request_id, message.engine, message.begin, message.end))
        if self.error is not None:
            raise self.error
        await self.node.clock.sleep(0.01)
        assert message.end is not None
        return Sent((message.end - message.begin) * LAYOUT.token_bytes, "inproc", message.end, 0, 0.0, 0.01, 0.0, 0.0)

    async def on_probe(self, message: Probe) -> Probed:
        self.calls.append(("probe",))
        return Probed(self.num_cached, 10, 10)

    async def on_release(self, message: Release) -> Done:
        self.calls.append(("release", message.kv.reservation_id))
        if self.release_s:
            await self.node.clock.sleep(self.release_s)
        self.reserved.pop(message.kv.reservation_id, None)
        return Done()


class NotingEngine(Actor):
    """An engine that generates the tokens 100, 101, ... and registers itself."""

    def __init__(self, manager: NotingManager, roles: tuple[str, ...]) -> None:
        self.manager = manager
        self.roles = roles
        self.calls: list[tuple[Any, ...]] = []
        self.prompts: list[tuple[list[int], int]] = []
        self.token_s = 0.001
        self.error: Exception | None = None
        self.fails_at = 0
        self.ends_at = -1
        """Before this position its streams end without a word."""
        self.num_open = 0
        self.registration: Registration

    async def start(self) -> None:
        entry = Entry(
            self.name, "engine", self.ref.address, model="m", roles=self.roles, manager=self.manager.ref.address
        )
        self.registration = Registration(self, entry)

    async def on_start_generate(self, message: StartGenerate) -> AsyncIterator[Token]:
        reservation = None if message.kv is None else message.kv.reservation_id
        self.calls.append(("start_generate", message.request_id, message.attempt, message.begin, reservation))
        self.prompts.append((unpack_tokens(message.prompt), message.num_output_tokens))
        if reservation is not None:
            self.manager.reserved.pop(reservation)
        self.num_open += 1
        try:
            for position in range(message.num_output_tokens, message.sampling.max_tokens):
                if self.error is not None and position == self.fails_at:
                    raise self.error
                if position == self.ends_at:
                    return
                await self.node.clock.sleep(self.token_s)
                is_last = position + 1 == message.sampling.max_tokens
                usage = Usage(num_tokens(message.prompt), 3, 1, 0, 0.0, 0.0, 0.0) if is_last else None
                yield Token(position, 100 + position, None, "length" if is_last else None, usage)
        finally:
            self.num_open -= 1

    def on_abort(self, message: Abort) -> Done:
        self.calls.append(("abort", message.request_id, message.attempt))
        return Done()


class Fleet:
    """A directory, a router and engines, each engine with its manager on a node of its own."""

    def __init__(self) -> None:
        self.hub = InprocHub()
        self.nodes: dict[str, Node] = {}
        self.engines: dict[str, NotingEngine] = {}
        self.managers: dict[str, NotingManager] = {}
        self.crashes: list[str] = []
        self.router: RouterActor
        self.directory: Ref
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        control = await self.node("control")
        self.directory = await self.start(control, "directory", Directory())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def node(self, name: str) -> Node:
        node = Node(
            name,
            endpoint=f"inproc://{name}",
            transport=self.hub.transport(),
            clock=VirtualClock(),
            seed=1,
            on_crash=lambda actor, _: self.crashes.append(actor),
        )
        self.nodes[name] = await self._stack.enter_async_context(node)
        return node

    async def start(self, node: Node, name: str, actor: Actor, directory: Ref | None = None) -> Ref:
        ref = await start_actor(node, name, actor, directory=directory)
        self._stack.push_async_callback(stop_actor, actor)
        return ref

    async def add_engine(self, name: str, *roles: str, manager: str | None = None) -> NotingEngine:
        node = await self.node(name)
        if manager is None:
            manager = f"kv-{name}"
            self.managers[manager] = NotingManager()
            await self.start(node, manager, self.managers[manager])
        self.engines[name] = NotingEngine(self.managers[manager], roles)
        await self.start(node, name, self.engines[name], self.directory)
        await self.sees(name)
        return self.engines[name]

    async def add_router(self, script: str, **config: Any) -> RouterActor:
        self.router = RouterActor(RouterActor.Config(script=script, **config))
        await self.start(self.nodes["control"], "main", self.router, self.directory)
        for name in self.engines:
            await self.sees(name)
        return self.router

    async def add_two(self, script: str = "disaggregate", **config: Any) -> None:
        """Add a prefill engine, a decode engine and a router."""
        await self.add_engine("prefill", "prefill")
        await self.add_engine("decode", "decode")
        await self.add_router(script, **config)

    async def settle(self) -> None:
        """Wait until what a client left behind is given back."""
        await asyncio.sleep(3.0)

    async def sees(self, name: str) -> None:
        """Wait until the router, if there is one, knows an engine."""
        if hasattr(self, "router"):
            await self.router.view.wait_for(lambda view: any(e.name == name for e in view.entries))

    async def kill(self, name: str) -> None:
        """End a node as if its process had died."""
        node = self.nodes[name]
        node.remove(name)
        await node.stop()

    def stream(self, request_id: str = "r", prompt: int = 40, max_tokens: int = 3, **fields: Any) -> Any:
        """Open a Generate stream to the router."""
        timeout = fields.pop("timeout", None)
        sampling = SamplingParams(max_tokens=max_tokens)
        message = Generate(request_id, fields.pop("model", "m"), pack_tokens(range(prompt)), sampling, **fields)
        return self.router.ref.stream(message, timeout=timeout)

    async def generate(self, request_id: str = "r", **fields: Any) -> list[int]:
        """Return all token ids of one request."""
        async with self.stream(request_id, **fields) as tokens:
            return [token.id async for token in tokens]

    def address(self, name: str) -> Address:
        return self.engines[name].ref.address

    def is_clean(self) -> bool:
        """Return whether nothing is reserved, generated or counted any more."""
        reserved = [addr for manager in self.managers.values() for addr in manager.reserved.values()]
        open_streams = sum(engine.num_open for engine in self.engines.values())
        counted = sum(self.router.loads.num_own(name) for name in self.engines)
        return not reserved and not open_streams and not counted and not self.router.num_in_flight


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet() as fleet:
        yield fleet
        assert fleet.crashes == []


@pytest.fixture
def write_script(tmp_path: Any) -> Callable[[str], str]:
    """Return a function that writes a script's body below the usual imports and returns its path."""

    def write(body: str, name: str = "script") -> str:
        path = tmp_path / f"{name}.py"
        path.write_text(f"import asyncio\nfrom callboard.router import *\n\n{body}")
        return str(path)

    return write
