"""The fleet of a dry run: two simulated engines of each role, each with its KV manager, and a router."""

import asyncio
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from typing import Any, Self

from callboard.actors.actor import Actor, start_actor, stop_actor
from callboard.actors.directory import Directory
from callboard.actors.engine.engine import Engine
from callboard.actors.engine.simulated import Simulation
from callboard.actors.kv_manager import KvManager
from callboard.actors.model_config import layout_of
from callboard.actors.protocol import KvAddr, PrepRecv, Release, Reserved, StartGenerate
from callboard.actors.route_protocol import BackgroundReport, ScriptText
from callboard.bus import Address, Node, Ref, VirtualClock
from callboard.bus.transports.sim import SimHub, Weather
from callboard.kv.lanes import Pace
from callboard.kv.layout import KvLayout
from callboard.router.actor import RouterActor
from callboard.router.request import Request
from callboard.router.shared import Shared
from callboard.router.spans import request_of
from callboard.router.swap.decisions import decision_of, noting

MODEL = "dry"
PER_ROLE = 2
DEADLINE_S = 20.0
LATENCY_S = 200e-6
BYTES_PER_S = 2e9
BLOCK_SIZE = 16
NUM_BLOCKS = 400
START_S = 60.0
OTHERS = "least_loaded"
"""The script of routers that the one on trial hands requests on to."""
SIMULATION = Simulation(
    seconds_per_step=5e-3, seconds_per_prefill_token=0.15e-3, seconds_per_decode=0.5e-3, vocab_size=32000
)
"""About what a model of 135M parameters takes on one core: what is large beside what should show."""


class _Pace(Pace):
    """Pages that take the time of a copy."""

    def piece_bytes(self, layout: KvLayout) -> int:
        return 1 << 40

    async def take(self, copy: Callable[[], int]) -> int:
        num_bytes = copy()
        await asyncio.sleep(num_bytes / BYTES_PER_S)
        return num_bytes


class _Manager(KvManager):
    def pace(self, to: str) -> Pace:
        return _Pace()


class Run:
    """One run of the script, watched: which verbs it called, and what it left reserved when it was over."""

    def __init__(self, shared: Shared, request: Request, path: str) -> None:
        self.shared = dataclasses.replace(shared, router=noting(shared.router, self._asked, self._answered, path=path))
        self.is_finished = self.is_moved = False
        self.request = request
        self.verbs: list[str] = []
        self.generates_at: Address | None = None
        self.leaks: tuple[int | None, ...] = ()
        self._held: dict[str, int | None] = {}
        self._lines: dict[int, int | None] = {}

    def end(self) -> None:
        self.leaks = tuple(self._held.values())

    def _asked(self, address: Address, message: Any, line: int | None) -> None:
        verb = decision_of(address, message)
        if verb is not None:
            self.verbs.append(verb)
        if isinstance(message, PrepRecv):
            self._lines[id(message)] = line
        elif isinstance(message, Release):
            self._held.pop(message.kv.reservation_id, None)
        elif isinstance(message, StartGenerate):
            self.generates_at = address
            if isinstance(message.kv, KvAddr):
                self._held.pop(message.kv.reservation_id, None)

    def _answered(self, address: Address, message: Any, answer: Any) -> None:
        if isinstance(answer, Reserved):
            self._held[answer.kv.reservation_id] = self._lines.pop(id(message), None)


class DryFleet:
    """Use as a context, on a virtual loop."""

    def __init__(self, text: ScriptText, roles: list[str], routers: Iterable[str] = ()) -> None:
        self.path = text.path
        self.client: Node
        self.router: Ref
        self.engines = {f"{role}-{number}": role for role in roles for number in range(PER_ROLE)}
        self.managers: dict[str, Address] = {}
        self._text = text
        self._routers = tuple(routers)
        self._runs: list[Run] = []
        self._actor: RouterActor
        self._hub = SimHub(1, weather=Weather(LATENCY_S, LATENCY_S), is_one_host=True)
        self._nodes: dict[str, Node] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        control, self.client = await self._node("control"), await self._node("client")
        directory = await self._start(control, "directory", Directory(), None)
        layout = layout_of(SIMULATION.facts, BLOCK_SIZE)
        for name, role in self.engines.items():
            manager = f"kv-{name}"
            config = KvManager.Config(manager, layout, NUM_BLOCKS)
            ref = await self._start(await self._node(manager), manager, _Manager(config), directory)
            self.managers[manager] = ref.address
            engine = Engine.Config(
                name=name,
                manager=ref.address,
                model=MODEL,
                roles=(role,),
                runner="simulated",
                block_size=BLOCK_SIZE,
                simulated=SIMULATION,
            )
            await self._start(await self._node(name), name, Engine(engine), directory)
        text = self._text
        self._actor = RouterActor(
            RouterActor.Config(script=text.path, options=text.options, deadline_s=DEADLINE_S, patience_s=5.0)
        )
        self._actor.routes.watcher = self._watch
        for name in self._routers:  # Whom the script hands requests on to.
            other = RouterActor.Config(name, OTHERS, deadline_s=DEADLINE_S, patience_s=5.0, is_inner=True)
            await self._start(await self._node(name), name, RouterActor(other), directory)
        self.router = await self._start(control, "main", self._actor, directory)
        async with asyncio.timeout(START_S):
            await self._actor.view.wait_for(
                lambda view: (
                    sum(each.kind == "engine" and each.state == "ready" for each in view.entries) == len(self.engines)
                )
            )
        await asyncio.sleep(1.0)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    def _watch(self, shared: Shared, request: Request) -> Run:
        run = Run(shared, request, self.path)
        self._runs.append(run)
        return run

    # ---- what happened -------------------------------------------------------------------------------------------

    def verbs_of(self, request_id: str) -> tuple[str, ...]:
        """Return the verbs of a request, those of later attempts marked."""
        lines = []
        for number, run in enumerate(self._of(request_id)):
            lines += [verb if not number else f"{verb}   (attempt {number + 1})" for verb in run.verbs]
        return tuple(lines)

    def notes_of(self, request_id: str) -> dict[str, str]:
        """Return what the script noted of a request."""
        return {name: value for run in self._of(request_id) for name, value in run.request.notes.items()}

    def trace_of(self, request_id: str) -> str:
        """Return the script's traceback, if a request failed by its fault."""
        return self._actor.routes.failure_of(request_id)

    def leaks(self) -> Iterator[str]:
        """Give a sentence for each line that reserved what nobody adopted or gave back while the script ran."""
        for run in self._runs:
            for line in run.leaks:
                where = self.path if line is None else f"{self.path}:{line}"
                yield f'{where}: what is reserved here is held until the request is over: write "async with"'

    def background(self) -> tuple[BackgroundReport, ...]:
        """Return how the script's background work did."""
        return self._actor.routes.report().versions[-1].background

    async def kill_the_one_that_generates(self, request_id: str) -> None:
        """Have the engine at which a request is crash."""
        runs = self._of(request_id)
        if runs and (at := runs[-1].generates_at) is not None:
            self._nodes[at.node].crash(at.actor, RuntimeError("the dry run let it die"))

    def _of(self, request_id: str) -> list[Run]:
        return [run for run in self._runs if request_of(run.request.id) == request_of(request_id)]

    # ---- starting ------------------------------------------------------------------------------------------------

    async def _node(self, name: str) -> Node:
        transport = self._hub.transport()
        node = Node(name, endpoint=f"sim://{name}", transport=transport, fleet=MODEL, clock=VirtualClock(), seed=1)
        self._nodes[name] = await self._stack.enter_async_context(node)
        return node

    async def _start(self, node: Node, name: str, actor: Actor, directory: Ref | None) -> Ref:
        own = None if directory is None else node.ref(directory.address)
        ref = await start_actor(node, name, actor, directory=own)
        self._stack.push_async_callback(stop_actor, actor)
        return ref
