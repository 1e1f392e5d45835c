"""A fleet in real processes, started as the launcher starts them, with a simulated model: for tests that kill some."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from waiting import PATIENCE_S, until

from callboard.actors.engine.simulated import SimulatedRunner, Simulation
from callboard.actors.node_spec import ActorSpec, NodeKind, NodeSpec, RestartPolicy
from callboard.actors.protocol import GetKvStats, KvStats
from callboard.actors.supervisor import Supervisor
from callboard.bus import Address, Node


class RealFleet:
    """Nodes by name, each a process. ``client`` is this process's own node among them."""

    def __init__(self, folder: Path, supervisor: Supervisor, client: Node) -> None:
        self.folder = folder
        self.supervisor = supervisor
        self.client = client

    def address(self, node: str, actor: str) -> Address:
        return Address(node, f"ipc://{self.folder}/{node}.sock", actor)

    async def start(self, *specs: NodeSpec) -> None:
        """Start processes side by side and wait until all are ready. They are not restarted by themselves."""
        await self.supervisor.start(specs)

    def node(self, name: str, kind: NodeKind, *actors: ActorSpec, **options: Any) -> NodeSpec:
        """Return a process with actors in it."""
        return NodeSpec(
            "test",
            name,
            kind,
            self.address(name, "").endpoint,
            actors,
            str(self.folder / f"{name}.log"),
            directory=self.address("directory", "directory"),
            restart=RestartPolicy(is_enabled=False),
            **options,
        )

    def directory(self) -> NodeSpec:
        """Return the directory, in a process of its own, always at the same endpoint."""
        return self.node("directory", "control", ActorSpec("directory", "callboard.actors.directory:Directory"))

    def router(self, *others: ActorSpec, **config: Any) -> NodeSpec:
        """Return the node ``control`` with the router ``main``, and what else is given."""
        settings = {"name": "main", "script": "round_robin", **config}
        router = ActorSpec("main", "callboard.router.actor:RouterActor", settings)
        return self.node("control", "control", router, *others)

    def engine(self, name: str, simulation: Simulation, *, num_blocks: int, **config: Any) -> tuple[NodeSpec, NodeSpec]:
        """Return an engine with a simulated runner, and its KV manager ``kv-NAME``."""
        layout = SimulatedRunner(simulation).layout
        manager = {
            "name": f"kv-{name}",
            "layout": msgspec.to_builtins(layout),
            "num_blocks": num_blocks,
            "socket_dir": str(self.folder),
        }
        actor = ActorSpec(f"kv-{name}", "callboard.actors.kv_manager:KvManager", manager)
        kv_manager = self.node(f"kv-{name}", "kv_manager", actor, pool_bytes=num_blocks * layout.block_bytes)
        engine = {
            "name": name,
            "model": "tiny",
            "manager": msgspec.to_builtins(self.address(f"kv-{name}", f"kv-{name}")),
            "runner": "simulated",
            "simulated": msgspec.to_builtins(simulation),
            **config,
        }
        return self.node(name, "engine", ActorSpec(name, "callboard.actors.engine.engine:Engine", engine)), kv_manager

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a node's process."""
        os.kill(self.supervisor.states[name].pid, number)

    async def kill(self, name: str) -> None:
        """Kill a node's process and wait until it is gone."""
        self.signal(name, signal.SIGKILL)
        await until(lambda: self.supervisor.states[name].state == "failed")

    def log(self, name: str) -> str:
        """Return what a node has logged."""
        return (self.folder / f"{name}.log").read_text()

    async def assert_all_free(self, engine: str) -> None:
        """Wait until every block of an engine's pool is free or cached."""
        manager = self.client.ref(self.address(f"kv-{engine}", f"kv-{engine}"))
        stats: KvStats | None = None
        async with asyncio.timeout(PATIENCE_S):
            while stats is None or stats.free + stats.cached != stats.num_blocks or stats.num_reservations:
                stats = await manager.ask(GetKvStats(recall=True), timeout=PATIENCE_S)
                assert not stats.problems
                await asyncio.sleep(0.02)


@asynccontextmanager
async def real_fleet(folder: Path) -> AsyncIterator[RealFleet]:
    """Give a fleet without processes; at the end those that were started are killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    supervisor = Supervisor(environment=environment, grace_s=5.0)
    try:
        async with Node("client", fleet="test") as client:
            yield RealFleet(folder, supervisor, client)
    finally:
        supervisor.kill()
        await supervisor.stop()
        assert supervisor.error is None
