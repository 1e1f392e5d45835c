"""The shape of the fleet that a fleet file would start."""

import asyncio
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import msgspec

from callboard.actors.engine.config import EngineConfig
from callboard.actors.kv_manager import KvManager
from callboard.actors.node_spec import NodeSpec
from callboard.tools.endpoints import IPC, Endpoints
from callboard.tools.errors import CliError
from callboard.tools.fleet_check import check_fleet
from callboard.tools.fleet_file import FleetFile, load_fleet_file
from callboard.tools.gpus import gpus_for
from callboard.tools.machine import allowed_cores, total_memory
from callboard.tools.models import resolve_models
from callboard.tools.plan import Machine, Plan, Planner
from callboard.tools.progress import terminal_show
from callboard.tools.running import cache_dir

from .shape import EngineShape, ManagerShape, RouterShape, Shape

ROUTER = "callboard.router.actor:RouterActor"


def shape_of_file(path: str) -> tuple[str, Shape]:
    """Return the name and the shape of the fleet of a file. Raises CliError."""
    file = load_fleet_file(Path(path))
    check_fleet(file)
    if not file.fleet.engine:
        raise CliError(f"{path} has no engines: nothing in it could serve a request")
    listen = msgspec.structs.replace(file.fleet.listen, frontends=1)  # A plan for several listens at the port.
    plan = asyncio.run(_plan(replace(file, fleet=msgspec.structs.replace(file.fleet, listen=listen))))
    engines, managers, routers = [], [], []
    token_bytes, block_size = set(), set()
    for node in plan.nodes:
        if node.kind == "engine":
            config = msgspec.convert(node.actors[0].config, EngineConfig)
            block_size.add(config.block_size)
            engines.append(_engine(node, config))
        elif node.kind == "kv_manager":
            pool = msgspec.convert(node.actors[0].config, KvManager.Config)
            token_bytes.add(pool.layout.token_bytes)
            managers.append(ManagerShape(pool.name, node.name, pool.num_blocks))
        for actor in node.actors:
            if actor.class_path == ROUTER:
                options = dict(actor.config)
                options["node"] = node.name
                routers.append(msgspec.convert(options, RouterShape))
    if len(block_size) > 1:
        raise CliError(f"the engines of {path} have blocks of several sizes, which is not simulated yet")
    # Of pools with different models: their bytes cannot be scaled by one number.
    common = token_bytes.pop() if len(token_bytes) == 1 else None
    return file.fleet.name, Shape(tuple(engines), tuple(managers), tuple(routers), block_size.pop(), common)


def _engine(node: NodeSpec, config: EngineConfig) -> EngineShape:
    return EngineShape(
        config.name,
        node.name,
        config.model,
        config.roles,
        config.manager.actor,
        config.device,
        config.max_num_batched_tokens,
        config.max_num_seqs,
        config.max_model_len,
    )


async def _plan(file: FleetFile) -> Plan:
    with tempfile.TemporaryDirectory(prefix="callboard-") as folder, Endpoints(IPC, Path(folder)) as endpoints:
        with terminal_show() as show:
            models = await resolve_models(
                file, cache=cache_dir(), log=Path(folder) / "models.log", environment=os.environ, show=show
            )
        machine = Machine(allowed_cores(), total_memory(), gpus_for(file.fleet))
        return Planner(
            file, run_dir=Path(folder), models=models, machine=machine, port=0, endpoints=endpoints, keys=b""
        ).plan()
