"""The fleet that is measured: the production actors, each in the process that ``callboard up`` gives it, over ipc.

Per token budget there is one pair of engines, each with a core and one thread, and one engine that has both cores and
two threads. Those that share a device share its KV manager. Only one of them works at a time; the others wait, which
costs nothing, so that budgets can take turns in one run. The control process has the directory, a router for each
strategy and the frontend.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from callboard.actors.engine.simulated import Simulation
from callboard.actors.model_config import layout_of, read_model_config
from callboard.actors.move_protocol import SetRoles
from callboard.actors.node_spec import ActorSpec, NodeKind, NodeSpec, RestartPolicy
from callboard.actors.protocol import Entry, ListEntries
from callboard.actors.supervisor import Supervisor
from callboard.bus import Address, Node
from callboard.router.script import read_script
from callboard.router.swap.changer import Changer
from callboard.router.swap.swap import Target, swap

from .load import FLEET
from .strategies import Strategy

ROUTER = "main"
DTYPE = "float32"
BLOCK_SIZE = 16
LEASE_S = 120.0
"""Where more is asked than can be done, prompts wait long for a prefill engine, and so do their reservations."""
MOST_QUEUED = 4096
ROLES = ("prefill", "decode")
SEEN_S = 0.03
SIMULATION = Simulation(seconds_per_step=1e-3, seconds_per_prefill_token=2e-5, seconds_per_decode=1e-4)


@dataclass(frozen=True, slots=True)
class Cores:
    """A core for each engine of a pair. All else, the client too, may use either, as it would on this machine."""

    first: int
    second: int

    @property
    def both(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.first, self.second)))


def cores_here() -> Cores:
    """Return the first two cores that this process may use; the same one twice where there is no second."""
    found = sorted(os.sched_getaffinity(0))
    return Cores(found[0], found[min(1, len(found) - 1)])


class Fleet:
    """The processes, and where their actors are."""

    def __init__(self, folder: Path, model: Path, supervisor: Supervisor, node: Node, *, is_simulated: bool) -> None:
        self.folder = folder
        self.model = model
        self.is_simulated = is_simulated
        self.node = node
        self.url = ""
        self._used: Strategy | None = None
        self._supervisor = supervisor

    def address(self, node: str, actor: str) -> Address:
        return Address(node, f"ipc://{self.folder}/{node}.sock", actor)

    @property
    def router(self) -> Address:
        return self.address("control", ROUTER)

    async def use(self, strategy: Strategy) -> None:
        """Make a strategy's script the router's, as ``callboard route set`` does."""
        if strategy == self._used:
            return
        changer = Changer(self.node.new_id, by=FLEET, at=time.time())
        # Never rolled back: what fails must be seen to fail, and not be measured as something else.
        decide = changer.set_script(read_script(strategy.script, strategy.options), max_failures=0)
        await swap(self.node, [Target(ROUTER, self.node.ref(self.router))], decide)
        self._used = strategy

    def engine(self, name: str) -> Address:
        return self.address(name, name)

    async def set_roles(self, budget: int, roles: str) -> None:
        """Give the two engines with a budget their roles ("split": a prefill and a decode engine; "any": both)."""
        wanted = {
            name: (role,) if roles == "split" else () for name, role in zip(pair_engines(budget), ROLES, strict=True)
        }
        entries = {entry.name: entry for entry in await self.entries()}
        wanted = {name: some for name, some in wanted.items() if entries[name].roles != some}
        for name, some in wanted.items():
            await self.node.ref(self.engine(name)).ask(SetRoles(some))
        while wanted:
            entries = {entry.name: entry for entry in await self.entries()}
            wanted = {name: some for name, some in wanted.items() if entries[name].roles != some}
            await asyncio.sleep(SEEN_S)  # The router hears of it when we do, or a moment later.

    def pids(self) -> dict[str, list[int]]:
        """Return the processes by what they are: engine, manager, control."""
        kinds = {"engine": "engine", "kv_manager": "manager", "control": "control"}
        found: dict[str, list[int]] = {kind: [] for kind in kinds.values()}
        for state in self._supervisor.states.values():
            found[kinds[state.kind]].append(state.pid)
        return found

    async def entries(self) -> tuple[Entry, ...]:
        return (await self.node.ref(self.address("control", "directory")).ask(ListEntries())).entries

    # ---- processes -----------------------------------------------------------------------------------------------

    def spec(self, name: str, kind: NodeKind, *actors: ActorSpec, **options: Any) -> NodeSpec:
        return NodeSpec(
            FLEET,
            name,
            kind,
            self.address(name, "").endpoint,
            actors,
            str(self.folder / f"{name}.log"),
            directory=self.address("control", "directory"),
            restart=RestartPolicy(is_enabled=False),
            log_level="warning",
            **options,
        )

    def control(self, models: dict[str, Any], port: int) -> NodeSpec:
        router = {"name": ROUTER, "script": "round_robin", "max_queue": MOST_QUEUED}
        frontend = {"name": "frontend", "host": "127.0.0.1", "port": port, "models": models}
        return self.spec(
            "control",
            "control",
            ActorSpec("directory", "callboard.actors.directory:Directory"),
            ActorSpec(ROUTER, "callboard.router.actor:RouterActor", router),
            ActorSpec("frontend", "callboard.actors.frontend.frontend:Frontend", frontend),
            is_essential=True,
        )

    def manager(self, name: str, num_tokens: int) -> NodeSpec:
        layout = layout_of(read_model_config(self.model), BLOCK_SIZE, DTYPE)
        num_blocks = num_tokens // BLOCK_SIZE
        config = {
            "name": name,
            "layout": msgspec.to_builtins(layout),
            "num_blocks": num_blocks,
            "device": name,
            "lease_s": LEASE_S,
            "socket_dir": str(self.folder),
        }
        actor = ActorSpec(name, "callboard.actors.kv_manager:KvManager", config)
        return self.spec(name, "kv_manager", actor, pool_bytes=num_blocks * layout.block_bytes)

    def an_engine(self, name: str, served: str, manager: str, budget: int, cores: tuple[int, ...]) -> NodeSpec:
        config = {
            "name": name,
            "model": served,
            "path": str(self.model),
            "roles": [],
            "device": manager,
            "manager": msgspec.to_builtins(self.address(manager, manager)),
            "runner": "simulated" if self.is_simulated else "transformers",
            "simulated": msgspec.to_builtins(SIMULATION) if self.is_simulated else {},
            "dtype": DTYPE,
            "block_size": BLOCK_SIZE,
            "max_num_batched_tokens": budget,
            "num_threads": len(cores),
        }
        actor = ActorSpec(name, "callboard.actors.engine.engine:Engine", config)
        return self.spec(name, "engine", actor, cores=cores, num_threads=len(cores))


def pair_model(budget: int) -> str:
    """Return the name under which the two engines with a budget serve."""
    return f"pair-{budget}"


def both_model(budget: int) -> str:
    """Return the name under which the engine on both cores serves."""
    return f"both-{budget}"


def pair_engines(budget: int) -> tuple[str, str]:
    """Return the names of the two engines with a budget: the prefill and the decode engine."""
    return f"p-{budget}", f"d-{budget}"


def both_engine(budget: int) -> str:
    """Return the name of the engine on both cores."""
    return f"b-{budget}"


@asynccontextmanager
async def running_fleet(
    folder: Path,
    model: Path,
    budgets: Sequence[int],
    *,
    pool_tokens: int,
    port: int,
    is_simulated: bool = False,
) -> AsyncIterator[Fleet]:
    """Start everything, and end everything."""
    supervisor = Supervisor(environment=os.environ, grace_s=5.0)
    cores = cores_here()
    limit = read_model_config(model).max_model_len
    names = {"path": str(model), "max_model_len": limit}
    served = {name: names for budget in budgets for name in (pair_model(budget), both_model(budget))}
    async with Node("bench", fleet=FLEET) as node:
        fleet = Fleet(folder, model, supervisor, node, is_simulated=is_simulated)
        fleet.url = f"http://127.0.0.1:{port}"
        try:
            await supervisor.start([fleet.control(served, port)])
            await supervisor.start([fleet.manager(name, pool_tokens) for name in ("kv-p", "kv-d", "kv-both")])
            engines = []
            for budget in budgets:
                prefill, decode = pair_engines(budget)
                name = pair_model(budget)
                engines += [
                    fleet.an_engine(prefill, name, "kv-p", budget, (cores.first,)),
                    fleet.an_engine(decode, name, "kv-d", budget, (cores.second,)),
                    fleet.an_engine(both_engine(budget), both_model(budget), "kv-both", budget, cores.both),
                ]
            await supervisor.start(engines)
            yield fleet
        finally:
            supervisor.kill()
            await supervisor.stop()
