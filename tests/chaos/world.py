"""A fleet of processes on one virtual loop, with what a supervisor does for each: start it, and again when it has died.

What runs inside of a process is what runs in production: ``callboard.actors.process.serve`` and its actors.
"""

import asyncio
import logging
from collections.abc import Callable
from random import Random
from typing import Any, cast

from simulated_wires import WireNetwork

from callboard.actors.actor import Actor
from callboard.actors.directory import Directory
from callboard.actors.engine.engine import Engine
from callboard.actors.engine.simulated import SimulatedRunner
from callboard.actors.kv_manager import KvManager
from callboard.actors.node_spec import ActorSpec, NodeKind, NodeSpec
from callboard.actors.process import serve
from callboard.actors.protocol import StartGenerate
from callboard.bus import Address, Node, Ref, VirtualClock
from callboard.bus.taps import ANSWERED, RECEIVED, SENT, WHAT, Row, TapRecord
from callboard.bus.testing import SimulatedProcess
from callboard.bus.transports.sim import SimHub, SimTransport
from callboard.kv.lanes import WIRES
from callboard.kv.tiers import TierSpec
from callboard.router.actor import RouterActor

from .schedule import CLIENTS, ROLES, Schedule
from .watcher import Watcher, bother

FLEET = "chaos"
JUST_AFTER_S = 1e-6
START_S = 10.0
"""A fleet with which nothing is wrong takes no longer to start."""
STOP_S = 30.0
"""No process may take longer to stop in order."""
STOP_ORDER: tuple[NodeKind, ...] = ("actor", "engine", "kv_manager", "control")

Make = Callable[[], Actor]


def endpoint_of(node: str) -> str:
    return f"sim://{node}"


def address_of(node: str, actor: str) -> Address:
    return Address(node, endpoint_of(node), actor)


class Machine:
    """One node of the fleet: its process, which may die, and its supervisor, which never does."""

    def __init__(self, world: "World", name: str, kind: NodeKind, actors: dict[str, Make]) -> None:
        self.world = world
        self.name = name
        self.kind = kind
        self.make = actors
        self.num_starts = 0
        self.restart_s = 0.1
        """How long it stays down the next time."""
        self.process: SimulatedProcess
        self.node: Node | None = None
        self.actors: dict[str, Any] = {}
        self.is_up = False
        self.is_ready = asyncio.Event()
        self._wants_stop: asyncio.Event
        self._ended: asyncio.Future[str]

    async def keep(self) -> None:
        """Start the process, and again whenever it has ended, until the world closes."""
        while not self.world.is_closing:
            self._start()
            how = await asyncio.shield(self._ended)
            self.is_up = False
            self.is_ready.clear()
            self.world.note(f"{self.name} {how}")
            await asyncio.sleep(self.restart_s)

    def ref_to(self, address: Address) -> Ref:
        assert self.node is not None
        return self.node.ref(address)

    @property
    def transport(self) -> SimTransport | None:
        return None if self.node is None else cast(SimTransport, self.node.transport)

    # ---- what may happen to it -----------------------------------------------------------------------------------

    def kill(self) -> None:
        if self.is_up:
            self.process.kill()

    def stop(self) -> None:
        if self.is_up:
            self.process.call_soon(self._wants_stop.set)

    def crash(self, actor: str) -> None:
        if self.is_up and self.node is not None and actor in self.actors:
            self.process.call_soon(self.node.crash, actor, PlantedCrash(f"{actor} was told to"))

    async def ended(self) -> None:
        """Wait until the process is gone."""
        if self.is_up:
            await asyncio.shield(self._ended)

    # ---- the process ---------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.num_starts += 1
        self.process = SimulatedProcess(f"{self.name}#{self.num_starts}")
        self._ended = asyncio.get_running_loop().create_future()
        self._wants_stop = asyncio.Event()
        self.node = None
        self.actors = {}
        self.is_up = True
        self.process.on_kill.append(lambda: self._end("was killed"))
        self.process.spawn(self._serve())

    async def _serve(self) -> None:
        self.actors = {name: make() for name, make in self.make.items()}
        specs = tuple(ActorSpec(name, "") for name in self.actors)
        directory = address_of("control", "directory")
        spec = NodeSpec(FLEET, self.name, self.kind, endpoint_of(self.name), specs, log="", directory=directory)
        pairs = [(spec, self.actors[spec.name]) for spec in specs]
        try:
            is_well = await serve(spec, pairs, self._wants_stop, self._report, make_node=self._make_node)
            how = "stopped" if is_well else "crashed"
            await asyncio.sleep(JUST_AFTER_S)  # What has its end before it may come to it.
            left = [task for task in self.process.unfinished() if task is not asyncio.current_task()]
            if left:
                self.world.problem(f"{self.process.name} {how} and left {left}")
        except Exception as error:
            self.world.problem(f"{self.process.name} ended with {error!r}")
            how = f"failed: {error!r}"
        self._end(how)

    def _end(self, how: str) -> None:
        """The process exits: whatever it left running is gone with it."""
        if not self._ended.done():
            self._ended.set_result(how)
            self.process.kill()

    def _report(self, state: str, detail: str = "", *, node: str = "", incarnation: str = "") -> None:
        if state == "ready":
            self.is_ready.set()
        elif state == "kill":
            machine = self.world.machines[node]
            if machine.node is not None and machine.node.incarnation == incarnation:
                self.world.note(f"{self.name} has {node} killed: {detail}")
                self.world.hub.at(asyncio.get_running_loop().time(), machine.kill)

    def _make_node(self, name: str, **options: Any) -> Node:
        world = self.world
        # A successor draws other ids than whoever died; the same ones in every run of the seed.
        seed = Random(f"{world.schedule.seed}/{name}/{self.num_starts}").getrandbits(63)
        self.node = Node(
            name,
            transport=world.hub.transport(),
            clock=VirtualClock(),
            seed=seed,
            links=world.schedule.links,
            **options,
        )
        self.node.follow(world.follower_of(self), everything=True)
        return self.node


class PlantedCrash(Exception):
    """A bug in an actor, as its node sees it."""


class World:
    """All machines of a schedule, and the record of what happens."""

    def __init__(self, schedule: Schedule, *, is_watched: bool = False) -> None:
        self.schedule = schedule
        self.is_watched = is_watched
        self.has_watched = False
        """The watcher has seen enough, and leaves."""
        self.num_seen = self.num_stories = 0
        self.hub = SimHub(schedule.seed, weather=schedule.weather, is_one_host=schedule.is_one_host)
        self.wires = WireNetwork(
            VirtualClock(), Random(f"wires of {schedule.seed}"), break_share=schedule.wires_break or 0.0
        )
        if schedule.wires_break is not None:
            self.hub.exchange[WIRES] = self.wires
        self.machines: dict[str, Machine] = {}
        self.problems: list[str] = []
        self.log: list[tuple[Any, ...]] = []
        self.is_closing = False
        self.is_calm = not schedule.may_fail
        """What goes wrong, the fleet recovers from: every request must bring its tokens, unless it is hit too often."""
        self.num_deaths = 0
        """Of engines and KV managers, as faults planned them."""
        self.num_continued = self.num_held = 0
        self.on_message: Callable[[Machine, str, str], None] = lambda machine, direction, kind: None
        self._supervisors: list[asyncio.Task[None]] = []

    # ---- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all machines in order, and wait until they are ready."""
        schedule = self.schedule
        layout = SimulatedRunner(schedule.engine["simulated"], block_size=schedule.engine["block_size"]).layout
        self._add("control", "control", {"directory": Directory, "main": self._router})
        for name in sorted(set(schedule.managers.values())):
            tiers = (TierSpec("host", schedule.num_host_blocks * layout.block_bytes),)
            tiers = tiers if schedule.num_host_blocks else ()
            config = KvManager.Config(
                name,
                layout,
                schedule.num_blocks,
                lease_s=schedule.lease_s,
                tiers=tiers,
                transport="auto" if schedule.wires_break is None else "ucx",
            )
            self._add(name, "kv_manager", {name: lambda config=config: KvManager(config)})
        for name, manager in schedule.managers.items():
            engine = Engine.Config(
                name=name,
                manager=address_of(manager, manager),
                model="tiny",
                roles=ROLES.get(name[0], ("prefill", "decode")),
                runner="simulated",
                **schedule.engine,
            )
            self._add(name, "engine", {name: lambda engine=engine: Engine(engine)})
        for name in CLIENTS:
            self._add(name, "actor", {})
        if self.is_watched:
            self._add("watcher", "actor", {"watcher": lambda: Watcher(self, address_of("control", "directory"))})
            bothering = bother(self, self.machines["watcher"])
            self._supervisors.append(asyncio.get_running_loop().create_task(bothering))
        async with asyncio.timeout(START_S):
            for machine in self.machines.values():
                await machine.is_ready.wait()

    async def close(self) -> None:
        """Stop all in order, kind by kind."""
        self.is_closing = True
        for kind in STOP_ORDER:
            machines = [machine for machine in self.machines.values() if machine.kind == kind]
            for machine in machines:
                machine.stop()
            for machine in machines:
                try:
                    async with asyncio.timeout(STOP_S):
                        await machine.ended()
                except TimeoutError:
                    self.problem(f"hung: {machine.name} did not stop within {STOP_S:g} s")
        for supervisor in self._supervisors:
            supervisor.cancel()

    def up(self, kind: type[Actor]) -> list[tuple[Machine, Any]]:
        """Return all running actors of a class, with their machines."""
        return [
            (machine, actor)
            for machine in self.machines.values()
            if machine.is_up
            for actor in machine.actors.values()
            if isinstance(actor, kind)
        ]

    def _add(self, name: str, kind: NodeKind, actors: dict[str, Make]) -> None:
        self.machines[name] = machine = Machine(self, name, kind, actors)
        self._supervisors.append(asyncio.get_running_loop().create_task(machine.keep()))

    def _router(self) -> RouterActor:
        return RouterActor(RouterActor.Config(script=self.schedule.script, options=self.schedule.options))

    @property
    def num_hits(self) -> int:
        """What may have ended an attempt so far: deaths, and wires that broke by themselves."""
        return self.num_deaths + self.wires.num_breaks

    def mend_wires(self) -> None:
        """Have no wire break any more."""
        self.wires.break_share = 0.0

    # ---- the record ----------------------------------------------------------------------------------------------

    def follower_of(self, machine: Machine) -> Any:
        name, log = machine.name, self.log

        def follow(row: Row, message: Any) -> None:
            record = TapRecord(*row)
            what = WHAT[record.what]
            log.append(
                (record.time, name, what, record.peer, record.actor, record.name, record.request_id, record.error)
            )
            if record.what in (SENT, RECEIVED):
                self.on_message(machine, what, record.name)
            if record.what == RECEIVED and isinstance(message, StartGenerate):
                self.num_continued += message.num_output_tokens > 0
            elif record.what == ANSWERED and record.name == "Freeze":
                self.num_held += not record.error

        return follow

    def note(self, what: str) -> None:
        """Put an event into the log."""
        self.log.append((asyncio.get_running_loop().time(), "***", what))

    def problem(self, what: str) -> None:
        """Note that something is wrong."""
        self.problems.append(what)
        self.note(f"WRONG: {what}")


class Records(logging.Handler):
    """Errors in the log are bugs, unless a crash was planted."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self.world = world

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, PlantedCrash):
            self.world.problem(f"logged: {record.getMessage()} {error!r}")
