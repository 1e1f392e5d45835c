"""Whether a fleet file makes sense: names, references, devices, sizes; each problem as a sentence with its remedy."""

import difflib
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from callboard.actors.embedded_model import ModelMissing, locate
from callboard.bus.keys import read_secret
from callboard.kv.lanes.ucx import is_installed
from callboard.router.errors import ScriptError
from callboard.router.script import LOAD_S, SHIPPED, load_in_time, read_script, shipped_scripts

from .api_keys import read_api_keys
from .endpoints import IPC, needs_keys, split_bus
from .fleet_file import Engine, Fleet, FleetFile, Problem, Restart, Router
from .gpus import NO_GPUS, Gpus, find_gpus, why_not_on
from .machine import split_address
from .tiers import check_tiers
from .toml_lines import Path as KeyPath
from .units import parse_duration, parse_size

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
NAME_RULE = 'use letters, digits, ".", "-" and "_", at most 40'
LEAST_SILENT_S = 0.5
MOST_KEPT = 100_000
RESERVED = ("control", "directory", "frontend", "launcher")
MOST_FRONTENDS = 64


def check_fleet(file: FleetFile, *, host: str = "", find_gpus: Callable[[], Gpus] = find_gpus) -> None:
    """Raise FleetFileError with everything that is wrong with the meaning of ``file``; touches no network.

    ``host`` is the joined one that this is, if it is: what others lack is for them to say.
    """
    problems = [*_listen(file), *_models(file), *_kv(file), *_names(file), *_engines(file), *_routers(file)]
    problems += _gpus(file, host, find_gpus)
    file.report([*problems, *_actors(file), *_hosts(file), *_trace(file)])


def engine_names(engine: Engine) -> list[str]:
    """Return the names of the engines that one ``[[engine]]`` makes."""
    return [engine.name] if engine.count == 1 else [f"{engine.name}-{index}" for index in range(engine.count)]


def router_names(router: Router) -> list[str]:
    """Return the names of the routers that one ``[[router]]`` makes."""
    return [router.name] if router.count == 1 else [f"{router.name}-{index}" for index in range(router.count)]


def frontend_names(fleet: Fleet) -> list[str]:
    """Return the names of the frontends."""
    count = min(fleet.listen.frontends, MOST_FRONTENDS)
    return ["frontend"] if count == 1 else [f"frontend-{index}" for index in range(count)]


def model_of(file: FleetFile, engine: Engine) -> str | None:
    """Return the model's name: the one the engine names, or the file's only one."""
    if engine.model is None and len(file.fleet.models) == 1:
        return next(iter(file.fleet.models))
    return engine.model


def manager_name(device: str, host: str = "") -> str:
    """Return the name of a device's KV manager: ``kv-cpu0`` for ``cpu:0``, on a joined host ``b`` ``kv-b-cpu0``."""
    where = f"{host}-" if host else ""
    return f"kv-{where}{device.replace(':', '')}"


def hosts_of(fleet: Fleet) -> list[str]:
    """Return the hosts that are to join, by name."""
    named = [engine.host for engine in fleet.engine] + [actor.host for actor in fleet.actor]
    return sorted({host for host in named if host})


def _attempt(path: KeyPath, function: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Problem]:
    try:
        function(*arguments, **options)
    except (ValueError, ModelMissing) as error:
        yield Problem(path, f"{path[-1]}: {error}")


def _at_least(path: KeyPath, value: float, least: int) -> Iterator[Problem]:
    if value < least:
        yield Problem(path, f"{path[-1]} must be at least {least}, not {value}")


def _listen(file: FleetFile) -> Iterator[Problem]:
    listen = file.fleet.listen
    yield from _attempt(("listen", "http"), split_address, listen.http)
    yield from _frontends(file)
    yield from _bus(file)
    yield from _silent(listen.silent)
    yield from _positive_duration(("listen", "stall"), listen.stall)
    if listen.api_keys is not None:
        yield from _attempt(("listen", "api_keys"), read_api_keys, file.base / Path(listen.api_keys).expanduser())


def _frontends(file: FleetFile) -> Iterator[Problem]:
    listen = file.fleet.listen
    if not 1 <= listen.frontends <= MOST_FRONTENDS:
        yield Problem(("listen", "frontends"), f"frontends must be 1 to {MOST_FRONTENDS}, not {listen.frontends}")
    elif listen.frontends > 1 and listen.microserving:
        # Each of the three calls of a request may come to another, and only the first would know the reservation.
        sentence = "microserving = true needs frontends = 1, because one process must see all calls of a request"
        yield Problem(("listen", "microserving"), f"{sentence}: remove one of them")


def _silent(value: str | float) -> Iterator[Problem]:
    problems = list(_positive_duration(("listen", "silent"), value))
    yield from problems
    if not problems and parse_duration(value) < LEAST_SILENT_S:
        sentence = "silent must be at least half a second, because a busy process is not heard of for a while, too"
        yield Problem(("listen", "silent"), f'{sentence}: write for example "5s"')


def keys_of(file: FleetFile) -> Path | None:
    """Return the directory of the fleet's keys; None if it has none."""
    keys = file.fleet.listen.keys
    return None if keys is None else file.base / Path(keys).expanduser()


def _bus(file: FleetFile) -> Iterator[Problem]:
    listen, folder = file.fleet.listen, keys_of(file)
    if folder is not None:
        yield from _attempt(("listen", "keys"), read_secret, folder)
    problems = [] if listen.bus == IPC else list(_attempt(("listen", "bus"), split_bus, listen.bus))
    yield from problems
    if not problems and listen.keys is None and needs_keys(listen.bus):
        yield Problem(
            ("listen", "bus"),
            f'other machines can reach bus = "{listen.bus}", so it needs keys: '
            'run "callboard keys new keys", and write keys = "keys" beside it',
        )


def _models(file: FleetFile) -> Iterator[Problem]:
    for name, model in file.fleet.models.items():
        yield from _attempt(("models", name, "path"), locate, model.path, base=file.base)
        if model.quantize != "none":
            path = ("models", name, "quantize")
            yield Problem(path, f'quantize = "{model.quantize}" is not supported by this version: remove it')
        if model.max_model_len is not None:
            yield from _at_least(("models", name, "max_model_len"), model.max_model_len, 1)


def _kv(file: FleetFile) -> Iterator[Problem]:
    kv, path = file.fleet.defaults.kv, ("defaults", "kv")
    yield from _attempt((*path, "size"), parse_size, kv.size, whole=1 << 30)
    yield from _positive_duration((*path, "lease"), kv.lease)
    yield from _restart(kv.restart, (*path, "restart"))
    yield from check_tiers(file)
    if why_not := _why_no_lane(file.fleet):
        yield Problem((*path, "transport"), f'{why_not} write transport = "auto"')
    if kv.wire != "auto" and kv.transport in ("inproc", "cuda_ipc", "shm"):
        sentence = f'wire = "{kv.wire}" is of use over UCX alone, and transport = "{kv.transport}" maps pools'
        yield Problem((*path, "wire"), f"{sentence}: remove one of them")
    # Its KV are hashes, of which rounding leaves nothing.
    simulated = [index for index, engine in enumerate(file.fleet.engine) if engine.runner == "simulated"]
    if simulated and kv.wire != "auto":
        yield Problem(
            (*path, "wire"), f'wire = "{kv.wire}" rounds KV, and that of simulated engines is lost so: remove it'
        )
    for index in simulated:
        if file.fleet.engine[index].dtype is not None:
            yield Problem(("engine", index, "dtype"), "a simulated engine computes no numbers: remove dtype")


def _why_no_lane(fleet: Fleet) -> str | None:
    """Return why KV pages cannot go between the fleet's pools by the transport that is asked for; None if they can."""
    transport = fleet.defaults.kv.transport
    pools = {manager_name(engine.device, engine.host) for engine in fleet.engine}
    if transport == "ucx" and not is_installed():
        return 'transport = "ucx" needs UCX, which is not installed here: run pip install "callboard[ucx]", or'
    if transport == "inproc" and len(pools) > 1:
        return 'transport = "inproc" leads nowhere, because each KV manager is a process of its own:'
    if transport == "shm" and len({engine.host for engine in fleet.engine}) > 1:
        return 'transport = "shm" does not lead from one host to another:'
    if transport == "shm" and any(engine.device.startswith("cuda") for engine in fleet.engine):
        return 'transport = "shm" does not lead into a pool on a GPU:'
    if transport == "cuda_ipc" and any(not engine.device.startswith("cuda") for engine in fleet.engine):
        return 'transport = "cuda_ipc" leads from one pool on a GPU to another, and not every engine is on one:'
    return None


def _positive_duration(path: KeyPath, value: str | float) -> Iterator[Problem]:
    problems = list(_attempt(path, parse_duration, value))
    yield from problems
    if not problems and parse_duration(value) <= 0:
        yield Problem(path, f'{path[-1]} must be longer than nothing: write for example "10s"')


def _names(file: FleetFile) -> Iterator[Problem]:
    fleet = file.fleet
    named: list[tuple[str, KeyPath]] = [("", ("name",))]
    if NAME.fullmatch(fleet.name) is None:
        yield Problem(("name",), f'"{fleet.name}" is no name: {NAME_RULE}')
    for index, engine in enumerate(fleet.engine):
        named += [(name, ("engine", index, "name")) for name in engine_names(engine)[:1000]]
    for index, router in enumerate(fleet.router):
        named += [(name, ("router", index, "name")) for name in router_names(router)[:1000]]
    named += [(actor.name, ("actor", index, "name")) for index, actor in enumerate(fleet.actor)]
    taken = {name: f"Callboard names an actor of its own {name}" for name in (*RESERVED, *frontend_names(fleet))}
    for engine in fleet.engine:
        taken[manager_name(engine.device, engine.host)] = f"the KV manager of {engine.device} has that name"
    for name, path in named[1:]:
        if NAME.fullmatch(name) is None:
            yield Problem(path, f'"{name}" is no name: {NAME_RULE}')
        elif name in taken:
            yield Problem(path, f'the name "{name}" is taken: {taken[name]}; give this one another name')
        where = file.lines.line_of(path)
        taken.setdefault(name, f"an actor on line {where} has it" if where else "another actor has it")


def _engines(file: FleetFile) -> Iterator[Problem]:
    fleet = file.fleet
    if not fleet.engine and not fleet.actor:
        yield Problem((), "the fleet has no [[engine]]: add one, or start from the file that callboard init writes")
    sizes: dict[str, int] = {}  # By the KV manager.
    for index, engine in enumerate(fleet.engine):
        path = ("engine", index)
        yield from _engine_model(file, engine, path)
        yield from _device(engine.device, (*path, "device"))
        if engine.tp != 1:
            yield Problem((*path, "tp"), f"tp = {engine.tp}: tensor parallelism does not exist yet, write tp = 1")
        if not engine.roles or len(set(engine.roles)) != len(engine.roles):
            yield Problem((*path, "roles"), 'roles must name "prefill", "decode" or both, each once')
        for key in ("count", "block_size", "max_num_batched_tokens", "max_num_seqs"):
            yield from _at_least((*path, key), getattr(engine, key), 1)
        yield from _restart(engine.restart, (*path, "restart"))
        size = sizes.setdefault(manager_name(engine.device, engine.host), engine.block_size)
        if size != engine.block_size:
            sentence = f"engines on {engine.device} share one pool, and another one has block_size = "
            yield Problem((*path, "block_size"), f"{sentence}{size}: give both the same")


def _engine_model(file: FleetFile, engine: Engine, path: KeyPath) -> Iterator[Problem]:
    models = file.fleet.models
    if engine.model is None:
        if len(models) != 1:
            hint = f"add model = one of {', '.join(models)}" if models else "add a table [models.NAME]"
            yield Problem(path, f'[[engine]] "{engine.name}" names no model: {hint}')
    elif engine.model not in models:
        near = difflib.get_close_matches(engine.model, models, n=1, cutoff=0.5)
        known = f"known are {', '.join(models)}" if models else f"add a table [models.{engine.model}]"
        hint = f'did you mean "{near[0]}"?' if near else known
        yield Problem((*path, "model"), f'there is no model "{engine.model}": {hint}')


def _device(device: str, path: KeyPath) -> Iterator[Problem]:
    if not device.startswith("cuda") and re.fullmatch(r"cpu(:\d+)?", device) is None:
        hint = 'write "cpu:0" (the first core), "cpu" (all cores), or "cuda:0" (the first GPU)'
        yield Problem(path, f'"{device}" is no device: {hint}')


def _gpus(file: FleetFile, host: str, find_gpus: Callable[[], Gpus]) -> Iterator[Problem]:
    """Yield what keeps this host's engines from running on the GPUs they name."""
    engines = [
        (("engine", index), engine)
        for index, engine in enumerate(file.fleet.engine)
        if engine.host == host and engine.device.startswith("cuda")
    ]
    found = find_gpus() if engines else NO_GPUS
    for path, engine in engines:
        if sentence := why_not_on(engine.device, found):
            yield Problem((*path, "device"), sentence)
        elif engine.runner == "simulated":
            sentence = 'a simulated engine computes on the CPU: write device = "cpu"'
            yield Problem((*path, "device"), sentence)


def _restart(restart: Restart, path: KeyPath) -> Iterator[Problem]:
    yield from _positive_duration((*path, "backoff"), restart.backoff)
    yield from _at_least((*path, "max"), restart.max, 0)


def script_path(file: FleetFile, script: str) -> Path | None:
    """Return the file of a router script, by path or shipped name; None if there is none."""
    local = file.base / Path(script).expanduser()
    if local.is_file():
        return local
    return SHIPPED / f"{script}.py" if script in shipped_scripts() else None


def _routers(file: FleetFile) -> Iterator[Problem]:
    if file.fleet.router and file.fleet.engine and all(router.inner for router in file.fleet.router):
        yield Problem(("router", 0, "inner"), "every router is inner, so nobody would ask one: remove inner from one")
    for index, router in enumerate(file.fleet.router):
        path = ("router", index)
        yield from _positive_duration((*path, "deadline"), router.deadline)
        yield from _positive_duration((*path, "patience"), router.patience)
        yield from _positive_duration((*path, "hang"), router.hang)
        yield from _at_least((*path, "max_queue"), router.max_queue, 1)
        yield from _at_least((*path, "count"), router.count, 1)
        yield from _restart(router.restart, (*path, "restart"))
        script = script_path(file, router.script)
        if script is None:
            near = difflib.get_close_matches(router.script, shipped_scripts(), n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"shipped are {', '.join(shipped_scripts())}"
            wanted = file.base / router.script
            yield Problem((*path, "script"), f"there is no router script {wanted}: {hint}")
            continue
        try:
            load_in_time(read_script(str(script), router.options), seconds=LOAD_S)
        except ScriptError as error:
            yield Problem((*path, "script"), str(error))


def _actors(file: FleetFile) -> Iterator[Problem]:
    for index, actor in enumerate(file.fleet.actor):
        path = ("actor", index)
        yield from _restart(actor.restart, (*path, "restart"))
        module, colon, name = actor.class_path.partition(":")
        if not colon or not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
            yield Problem((*path, "class"), f'"{actor.class_path}" is no class: write "module:Class"')
            continue
        top = module.split(".")[0]
        stem = file.base / Path(*module.split("."))
        here = stem.with_suffix(".py").is_file() or (stem / "__init__.py").is_file()
        if not here and importlib.util.find_spec(top) is None:
            yield Problem((*path, "class"), f"there is no module {module}: put {stem.with_suffix('.py')} in place")


def _hosts(file: FleetFile) -> Iterator[Problem]:
    fleet = file.fleet
    named = [(("engine", index, "host"), engine.host) for index, engine in enumerate(fleet.engine)]
    named += [(("actor", index, "host"), actor.host) for index, actor in enumerate(fleet.actor)]
    for path, host in named:
        if host and NAME.fullmatch(host) is None:
            yield Problem(path, f'"{host}" is no name of a host: {NAME_RULE}')
        elif host and fleet.listen.bus == IPC:
            sentence = f'host "{host}" cannot reach a fleet whose bus is "ipc"'
            yield Problem(path, f'{sentence}: write for example bus = "tcp://10.0.0.1:7000" under [listen]')


def _trace(file: FleetFile) -> Iterator[Problem]:
    if not 1 <= file.fleet.trace.keep <= MOST_KEPT:
        yield Problem(("trace", "keep"), f"a node can remember 1 to {MOST_KEPT} requests: write for example 1000")
