"""The part of the plan that asks engines and does not compute: the control node, and those of routers and frontends."""

from pathlib import Path
from typing import Any, Protocol

import msgspec

from callboard.actors.node_spec import ActorSpec, NodeKind, NodeSpec, RestartPolicy
from callboard.bus import Address
from callboard.bus.private import why_open

from .api_keys import read_api_keys
from .endpoints import CONTROL, Endpoints
from .fleet_check import frontend_names, router_names, script_path
from .fleet_file import Engine, Fleet, FleetFile, Restart, Router
from .kept_logs import kept_at
from .machine import split_address
from .units import parse_duration

LAST_WORD_S = 1.0
"""What the frontend adds to a router's deadline: the router should be the one to say that it passed."""
FRONTEND_RESTART = Restart(backoff="200ms")
"""Of each of several frontends: as a router's by default."""
FRONTEND_BYTES = 100 << 20
"""What the process of one of several frontends takes."""
HUNG_SHARE = 0.4
"""Of the time after which a silent process is cut off: by then a script that keeps it silent is interrupted."""


class Planning(Protocol):
    """What this part takes of the Planner."""

    file: FleetFile
    fleet: Fleet
    run_dir: Path
    port: int
    endpoints: Endpoints
    models: dict[str, Path]
    max_lens: dict[str, int]
    warnings: list[str]

    def address(self, node: str, actor: str) -> Address:
        """Return where an actor will be."""

    def node(self, name: str, kind: NodeKind, *actors: ActorSpec, **options: Any) -> NodeSpec:
        """Return a process with actors in it."""

    def model_of(self, engine: Engine) -> str:
        """Return the name of an engine's model."""


def control_node(planner: Planning) -> NodeSpec:
    """Return the node of the directory, and of router and frontend where there is but one."""
    fleet = planner.fleet
    actors = [ActorSpec("directory", "callboard.actors.directory:Directory")]
    if is_alone(routers := routers_of(fleet)):
        actors.append(_router(planner, routers[0], routers[0].name))
    if fleet.engine and fleet.listen.frontends == 1:
        actors.append(_frontend("frontend", _frontend_config(planner)))
    keeps, removes = str(kept_at(fleet.name)), str(planner.run_dir)
    return planner.node(CONTROL, "control", *actors, removes=removes, keeps_logs_at=keeps, is_essential=True)


def router_nodes(planner: Planning) -> list[NodeSpec]:
    """Return a node for each router, so that one can die alone; none if there is but one."""
    routers = routers_of(planner.fleet)
    if is_alone(routers):
        return []
    return [
        planner.node(name, "router", _router(planner, router, name), restart=policy_of(router.restart))
        for router in routers
        for name in router_names(router)
    ]


def frontend_nodes(planner: Planning) -> list[NodeSpec]:
    """Return a node for each of several frontends, which accept at one socket; none if there is but one."""
    fleet, names = planner.fleet, frontend_names(planner.fleet)
    if not fleet.engine or len(names) == 1:
        return []
    host, _ = split_address(fleet.listen.http)
    fd = planner.endpoints.listen(host, planner.port)
    config = _frontend_config(planner)
    config["shared"] = {"fd": fd, "names": names, "folder": str(planner.run_dir)}
    return [
        planner.node(
            name,
            "frontend",
            _frontend(name, config),
            restart=policy_of(FRONTEND_RESTART),
            inherits=(fd,),
            is_needed_of_its_kind=True,
        )
        for name in names
    ]


def routers_of(fleet: Fleet) -> tuple[Router, ...]:
    """Return the routers of a fleet file, or what it has where it names none."""
    if fleet.router or not fleet.engine:
        return fleet.router
    roles = [set(engine.roles) for engine in fleet.engine]
    is_split = {"prefill"} in roles and {"decode"} in roles
    return (Router("main", "disaggregate" if is_split else "least_loaded"),)


def is_alone(routers: tuple[Router, ...]) -> bool:
    """Return whether there is one router and no more."""
    return sum(router.count for router in routers) == 1


def policy_of(restart: Restart) -> RestartPolicy:
    """Return what a supervisor is told of a fleet file's ``restart``."""
    return RestartPolicy(restart.policy == "on-failure", parse_duration(restart.backoff), restart.max)


def _router(planner: Planning, router: Router, name: str) -> ActorSpec:
    script = script_path(planner.file, router.script)
    config = {
        "name": name,
        "script": router.script if script is None else str(script),
        "options": router.options,
        "deadline_s": parse_duration(router.deadline),
        "max_queue": router.max_queue,
        "patience_s": parse_duration(router.patience),
        "hung_s": min(parse_duration(router.hang), HUNG_SHARE * parse_duration(planner.fleet.listen.silent)),
        "keep": planner.fleet.trace.keep,
        "routes_at": str(planner.run_dir / f"{name}.routes"),
        "is_inner": router.inner,
    }
    return ActorSpec(name, "callboard.router.actor:RouterActor", config)


def _frontend(name: str, config: dict[str, Any]) -> ActorSpec:
    return ActorSpec(name, "callboard.actors.frontend.frontend:Frontend", {"name": name, **config})


def _frontend_config(planner: Planning) -> dict[str, Any]:
    fleet = planner.fleet
    host, _ = split_address(fleet.listen.http)
    roles: dict[str, set[str]] = {}
    for engine in fleet.engine:
        roles.setdefault(planner.model_of(engine), set()).update(engine.roles)
    config: dict[str, Any] = {
        "host": host,
        "port": planner.port,
        "stall_s": parse_duration(fleet.listen.stall),
        "microserving": fleet.listen.microserving,
        "models": {
            name: {"path": str(planner.models[name]), "max_model_len": planner.max_lens[name], "roles": sorted(needed)}
            for name, needed in roles.items()
        },
        **_asked(planner, routers_of(fleet)),
    }
    if fleet.listen.api_keys is not None:
        path = planner.file.base / Path(fleet.listen.api_keys).expanduser()
        config["api_keys"] = list(read_api_keys(path))
        if reason := why_open(path, path.stat()):
            planner.warnings.append(f"the API keys are no secret, because {reason}")
    return config


def _asked(planner: Planning, routers: tuple[Router, ...]) -> dict[str, Any]:
    """Return whom the frontend asks, and for how long: over all routers no longer than one would have had."""
    asked = [router for router in routers if not router.inner]
    limits = {
        "request_timeout_s": max(parse_duration(router.deadline) for router in asked) + LAST_WORD_S,
        "patience_s": max(parse_duration(router.patience) for router in asked),
    }
    if is_alone(routers):
        return {**limits, "router": msgspec.to_builtins(planner.address(CONTROL, asked[0].name))}
    names = [name for router in asked for name in router_names(router)]
    return {**limits, "routers": names if len(asked) < len(routers) else []}
