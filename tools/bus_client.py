"""A command's short visit to a fleet's bus: one ask, on a node that only dials."""

import asyncio
import os
from typing import TypeVar

from callboard.actors.protocol import Entry, ListEntries
from callboard.bus import Address, Ask, BusError, Node
from callboard.bus.transports.zmq import KEY_REFUSED

from .errors import CliError
from .running import RunningFleet

R = TypeVar("R")
TIMEOUT_S = 3.0


async def _ask(fleet: RunningFleet, address: Address, message: Ask[R], timeout: float) -> R:
    async with Node(f"callboard-{os.getpid()}", fleet=fleet.state.name, keys=fleet.keys()) as node:
        return await node.ref(address).ask(message, timeout=timeout)


def ask(fleet: RunningFleet, address: Address, message: Ask[R], timeout: float = TIMEOUT_S) -> R:
    """Ask one actor of a running fleet. Raises BusError, and CliError for want of the fleet's keys."""
    try:
        return asyncio.run(_ask(fleet, address, message, timeout))
    except BusError as error:
        if KEY_REFUSED in str(error):
            raise CliError(fleet.why_refused()) from None
        raise


def list_entries(fleet: RunningFleet) -> tuple[Entry, ...]:
    """Return what the fleet's directory knows. Raises BusError, CliError."""
    return ask(fleet, fleet.state.directory, ListEntries()).entries


def find_entry(fleet: RunningFleet, *, kind: str) -> Entry:
    """Return the first actor of a kind. Raises CliError if there is none, or the directory does not answer."""
    try:
        entries = list_entries(fleet)
    except BusError as error:
        name = fleet.state.name
        raise CliError(f'the directory of fleet "{name}" does not answer ({error}): see callboard ps {name}') from None
    for entry in entries:
        if entry.kind == kind:
            return entry
    raise CliError(f'fleet "{fleet.state.name}" has no {kind}')
