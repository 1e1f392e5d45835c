"""``callboard join``: bring the engines of this machine into a fleet that runs on another one."""

import argparse
import os
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import uvloop

from callboard.actors.supervisor import Supervisor
from callboard.bus import LinkConfig
from callboard.bus.tasks import Tasks

from .bus_client import visitor
from .endpoints import JoinedEndpoints, address_towards, endpoint_at, needs_keys, parse_listen, resolve
from .errors import CliError
from .fleet_check import NAME, NAME_RULE, check_fleet, hosts_of, keys_of, model_of
from .fleet_file import FleetFile, Listen, load_fleet_file
from .launcher import Launcher, log
from .membership import Membership
from .plan import Plan
from .progress import Event, Show, Started, terminal_show
from .running import RunningFleet, open_fleet
from .units import parse_duration
from .up import detach, run_daemon, say_started, with_farewell


@dataclass(frozen=True, slots=True)
class Join:
    """What is to be joined, and how: the part of the fleet file that is this host's, and where its nodes listen."""

    file: FleetFile
    fleet: RunningFleet
    host: str
    listen: str
    port: int


def run(arguments: argparse.Namespace) -> int:
    """Join, and stay until told to leave. Raises CliError."""
    if arguments.detach:
        load(arguments)  # What is wrong with it is said here.
        words = [arguments.address, arguments.file]
        for option in ("host", "keys", "listen"):
            value = getattr(arguments, option)
            words += [] if value is None else [f"--{option}", value]
        return say_started(detach("join", words))
    join = load(arguments)
    if arguments.events_fd is not None:
        return run_daemon(lambda show: _launch(join, show, is_detached=True), arguments.events_fd)
    with terminal_show() as show:
        return uvloop.run(_launch(join, with_farewell(show), is_detached=False))


def load(arguments: argparse.Namespace) -> Join:
    """Return what the command line asks for. Raises CliError."""
    host = arguments.host if arguments.host is not None else _own_name()
    if NAME.fullmatch(host) is None:
        raise CliError(f'--host "{host}" is no name of a host: {NAME_RULE}')
    if "://" not in arguments.address:
        raise CliError(f'"{arguments.address}" is no address of a fleet: write for example "tcp://10.0.0.1:7000"')
    file = load_fleet_file(Path(arguments.file))
    address = arguments.address if "@" in arguments.address else f"{file.fleet.name}@{arguments.address}"
    own_keys = keys_of(file)
    keys = arguments.keys or (None if own_keys is None else str(own_keys))
    fleet = open_fleet(address, keys=keys)
    fleet.keys()  # That they cannot be read is said before anything else is tried.
    fleet, listen, port = _places(fleet, arguments.listen)
    if keys is None and needs_keys(endpoint_at(listen, port)):
        raise CliError(f"other machines can reach {listen}, so keys are needed: name the fleet's with --keys DIR")
    return Join(_part_of(file, host, fleet, endpoint_at(listen, port)), fleet, host, listen, port)


def _own_name() -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", socket.gethostname().partition(".")[0]).strip("-._")[:20] or "joined"


def _places(fleet: RunningFleet, wanted: str | None) -> tuple[RunningFleet, str, int]:
    """Return the fleet at its IP address, and address and first port (0: any) at which the nodes here listen."""
    at = fleet.state.directory.endpoint
    try:
        host, port = resolve(at)
    except OSError:
        raise CliError(f"this machine does not know the host of {at}: give its IP address") from None
    directory = msgspec.structs.replace(fleet.state.directory, endpoint=endpoint_at(host, port))
    fleet = replace(fleet, state=msgspec.structs.replace(fleet.state, directory=directory))
    if wanted is not None:
        try:
            return fleet, *parse_listen(wanted)
        except ValueError as error:
            raise CliError(f"--listen: {error}") from None
    try:
        return fleet, address_towards(host, port), 0
    except OSError as error:
        raise CliError(f"no route leads to {host} ({(error.strerror or str(error)).lower()})") from None


def _part_of(file: FleetFile, host: str, fleet: RunningFleet, bus: str) -> FleetFile:
    """Return the fleet file as it is for this host; where it names no host, all of it is this one's."""
    whole = file.fleet
    hosts = hosts_of(whole)
    if hosts and host not in hosts:
        others = ", ".join(hosts)
        raise CliError(f'{file.source} has nothing for host "{host}", but for {others}: pass --host {hosts[0]}')
    if not hosts:
        engines = tuple(msgspec.structs.replace(each, host=host) for each in whole.engine)
        actors = tuple(msgspec.structs.replace(each, host=host) for each in whole.actor)
        whole = msgspec.structs.replace(whole, engine=engines, actor=actors)
    keys = None if fleet.keys_folder is None else str(fleet.keys_folder.absolute())
    listen = Listen(bus=bus, keys=keys, silent=whole.listen.silent, stall=whole.listen.stall)
    whole = msgspec.structs.replace(whole, name=fleet.state.name, listen=listen, router=())
    check_fleet(FleetFile(whole, file.base, file.source, file.lines), host=host)
    used = {model_of(file, engine) for engine in whole.engine if engine.host == host}
    models = {name: model for name, model in whole.models.items() if name in used}
    return FleetFile(msgspec.structs.replace(whole, models=models), file.base, file.source, file.lines)


async def _launch(join: Join, show: Show, *, is_detached: bool) -> int:
    return await JoinLauncher(join, show=show, is_detached=is_detached).run()


class JoinLauncher(Launcher):
    """The launcher of a joined host: it has no control node, and asks the fleet's."""

    _membership: Membership

    def __init__(self, join: Join, *, show: Show, is_detached: bool) -> None:
        super().__init__(join.file, show=show, environment=os.environ, is_detached=is_detached)
        self.host = join.host
        self._join = join
        self._title = f"{join.fleet.state.name}@{join.host}"
        self._tasks = Tasks(self._broke)

    async def _serve(self, lock: int) -> int:
        join = self._join
        with JoinedEndpoints(join.fleet.state.directory.endpoint, join.listen, join.port) as endpoints:
            async with self._visit():
                await self._membership.entries()  # Before models are read: it may take long.
                return await self._serve_at(endpoints, lock)

    @asynccontextmanager
    async def _visit(self) -> AsyncIterator[None]:
        silent_s = parse_duration(self._file.fleet.listen.silent)
        links = LinkConfig(ping_s=min(1.0, silent_s / 5), silent_s=silent_s)
        async with visitor(self._join.fleet, links=links) as node:
            self._membership = Membership(node, self._join.fleet, host=self.host)
            try:
                yield
            finally:
                await self._tasks.cancel()

    async def _enter(self, plan: Plan) -> None:
        await super()._enter(plan)
        self._show(Event("step", f"entering fleet {self._file.fleet.name}"))
        await self._membership.require_same(plan.facts)
        await self._membership.require_free({node.name: node.kind for node in plan.nodes})

    async def _arrive(self, plan: Plan, supervisor: Supervisor) -> None:
        endpoints = {node.name: node.endpoint for node in plan.nodes if node.kind in ("engine", "kv_manager")}
        self._show(Event("step", "waiting for the fleet to see the engines"))
        await self._membership.wait_until_listed(endpoints)
        self._tasks.spawn(self._membership.watch(endpoints, self._say))

    def _started(self, plan: Plan) -> Started:
        names = tuple(node.name for node in plan.nodes)
        bus = plan.directory.endpoint
        return msgspec.structs.replace(super()._started(plan), bus=bus, host=self.host, hosts=(), nodes=names)

    def _say(self, sentence: str, is_bad: bool) -> None:
        log.log(30 if is_bad else 20, "%s", sentence)
        self._show(Event("warning" if is_bad else "news", sentence))

    def _broke(self, error: BaseException) -> None:
        log.error("the watch over the fleet broke", exc_info=error)
