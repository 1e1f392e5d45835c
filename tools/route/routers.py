"""The routers of a running fleet, as ``callboard route`` reaches them."""

import argparse
import asyncio
import getpass
import os
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

from callboard.actors.protocol import Entry, ListEntries
from callboard.bus import BusError, Node
from callboard.router.errors import RouteRefused, ScriptError
from callboard.router.swap.changer import Changer
from callboard.router.swap.swap import Target
from callboard.tools.bus_client import TIMEOUT_S, visitor, why_not
from callboard.tools.errors import CliError
from callboard.tools.running import RunningFleet, open_fleet

T = TypeVar("T")
Visit = Callable[[Node, list[Target]], Awaitable[T]]


def visit(arguments: argparse.Namespace, do: Visit[T]) -> T:
    """Do something with the routers that ``arguments`` name. Raises CliError."""
    fleet = open_fleet(arguments.fleet, keys=arguments.keys)
    try:
        return asyncio.run(_visit(fleet, arguments.router, do))
    except (RouteRefused, ScriptError) as error:
        raise CliError(str(error)) from None


async def _visit(fleet: RunningFleet, name: str | None, do: Visit[T]) -> T:
    async with visitor(fleet) as node:
        try:
            entries = (await node.ref(fleet.state.directory).ask(ListEntries(), timeout=TIMEOUT_S)).entries
        except BusError as error:
            raise why_not(fleet, error) from None
        targets = [Target(each.name, node.ref(each.address)) for each in _choose(fleet, entries, name)]
        return await do(node, targets)


def _choose(fleet: RunningFleet, entries: tuple[Entry, ...], name: str | None) -> list[Entry]:
    """Return the routers, ordered by name, as everybody who changes them takes them."""
    routers = sorted((entry for entry in entries if entry.kind == "router"), key=lambda entry: entry.name)
    if not routers:
        raise CliError(f'fleet "{fleet.state.name}" has no router')
    if name is not None:
        chosen = [entry for entry in routers if entry.name == name]
        if not chosen:
            known = ", ".join(entry.name for entry in routers)
            raise CliError(f'fleet "{fleet.state.name}" has no router "{name}": there is {known}')
        return chosen
    return [entry for entry in routers if "inner" not in entry.detail] or routers


def changer(node: Node, arguments: argparse.Namespace) -> Changer:
    """Return who changes scripts here."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # A container without a name for its user.
        user = f"user {os.getuid()}"
    names = () if arguments.router is None else (arguments.router,)
    return Changer(node.new_id, f"{user}@{socket.gethostname()}", node.clock.wall(), names)


def options_of(pairs: list[str]) -> dict[str, str]:
    """Return a script's options of ``NAME=VALUE``. Raises CliError."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise CliError(f'"{pair}" sets no option: write for example --set ratio=0.3')
        options[name] = value
    return options
