"""More engines for a fleet that runs: what a further one is called, where it runs, and which nodes it needs."""

import difflib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import msgspec

from callboard.actors.node_spec import NodeSpec

from .errors import CliError, FleetFileError
from .fleet_check import NAME, NAME_RULE, check_fleet, engine_names
from .fleet_file import Engine, FleetFile
from .gpus import Gpus
from .launcher_calls import AddEngines
from .plan import Memory, Plan

MOST_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Growth:
    """What is added: the fleet file with it, its nodes in stages, and what they need."""

    file: FleetFile
    engines: tuple[Engine, ...]
    stages: tuple[tuple[NodeSpec, ...], ...]
    memory: Memory
    warnings: tuple[str, ...]


def grow(
    file: FleetFile,
    call: AddEngines,
    *,
    host: str,
    taken: Collection[str],
    gpus: Gpus,
    plan: Callable[[FleetFile], Plan],
) -> Growth:
    """Return what ``call`` asks for. ``taken`` are the nodes that are there. Raises CliError.

    ``plan`` makes the plan of a fleet file on this host.
    """
    if not 1 <= call.count <= MOST_AT_ONCE:
        raise CliError(f"--count {call.count}: give 1 to {MOST_AT_ONCE}")
    if call.name is not None and call.count > 1:
        raise CliError("--name is for one engine: leave it out, or --count")
    like = _like(file, call.like, host)
    names = {*taken, *call.taken}
    for engine in file.fleet.engine:
        names.update(engine_names(engine))
    engines: list[Engine] = []
    for _ in range(call.count):
        name = _free_name(like, names) if call.name is None else call.name
        if NAME.fullmatch(name) is None:
            raise CliError(f'"{name}" is no name: {NAME_RULE}')
        if name in names:
            raise CliError(f'the fleet has a "{name}" already: give the new one another name')
        names.add(name)
        used = [engine.device for engine in (*file.fleet.engine, *engines) if engine.host == host]
        device = call.device if call.device is not None else _free_device(like.device, used, gpus)
        engines.append(msgspec.structs.replace(like, name=name, device=device, count=1))
    added = tuple(engines)
    whole = replace(file, fleet=msgspec.structs.replace(file.fleet, engine=(*file.fleet.engine, *added)))
    listen = msgspec.structs.replace(file.fleet.listen, frontends=1)  # Those that are there take no further memory.
    alone = replace(file, fleet=msgspec.structs.replace(file.fleet, engine=added, actor=(), listen=listen))
    try:
        check_fleet(whole, host=host)
        made = plan(alone)
    except FleetFileError as error:
        raise CliError(_without_place(error)) from None
    stages = [
        tuple(node for node in stage if node.kind in ("kv_manager", "engine") and node.name not in taken)
        for stage in made.stages
    ]
    has_pool = any(node.kind == "kv_manager" for stage in stages for node in stage)
    memory = made.memory if has_pool else replace(made.memory, pools=0)
    return Growth(whole, added, tuple(stage for stage in stages if stage), memory, made.warnings)


def _like(file: FleetFile, wanted: str, host: str) -> Engine:
    """Return the engine of the fleet file that makes ``wanted``, or has that name. Raises CliError."""
    engines = [engine for engine in file.fleet.engine if engine.host == host]
    for engine in engines:
        if wanted == engine.name or wanted in engine_names(engine):
            return engine
    known = [name for engine in engines for name in dict.fromkeys((engine.name, *engine_names(engine)))]
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(known) or 'none'}"
    raise CliError(f'there is no engine "{wanted}" to be like: {hint}')


def _free_name(like: Engine, names: Collection[str]) -> str:
    stem, dash, number = like.name.rpartition("-")
    if not (dash and number.isdigit() and like.count == 1):
        stem = like.name
    index = like.count
    while f"{stem}-{index}" in names:
        index += 1
    return f"{stem}-{index}"


def _free_device(device: str, used: Iterable[str], gpus: Gpus) -> str:
    """Return a device of the same kind that has no engine; where there is no other, the same. Raises CliError."""
    kind, colon, _ = device.partition(":")
    if not colon:
        return device  # All cores: they are shared.
    taken = set(used)
    if kind == "cuda":
        free = [each for each in (f"cuda:{index}" for index in range(len(gpus.found))) if each not in taken]
        if not free:
            raise CliError(f"every GPU has an engine: name one to be shared with --device {device}")
        return free[0]
    index = 0
    while f"cpu:{index}" in taken:
        index += 1
    return f"cpu:{index}"


def _without_place(error: FleetFileError) -> str:
    """Return the first problem without the place in the file, which has no line for what was added."""
    return error.problems[0].partition(": ")[2] or error.problems[0]
