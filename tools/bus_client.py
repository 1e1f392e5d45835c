"""A command's short visit to a fleet's bus: one ask, on a node that only dials."""

import asyncio
import logging
import os
from typing import Any, TypeVar

from callboard.actors.protocol import Entry, ListEntries
from callboard.bus import Address, Ask, AskTimeout, BusError, Node
from callboard.bus.transports.zmq import KEY_REFUSED

from .errors import CliError
from .running import RunningFleet

R = TypeVar("R")
TIMEOUT_S = 3.0


def visitor(fleet: RunningFleet, **options: Any) -> Node:
    """Return a node for a visit to the fleet's bus: it dials, and cannot be dialled. Raises CliError for its keys.

    ``options`` are Node's.
    """
    # What becomes of links is told by the command in its own words: nobody reads the bus's in the midst of a view.
    log = logging.getLogger("callboard")
    if not log.handlers:
        log.addHandler(logging.NullHandler())
    # Two of one name would break each other's links, and other machines and containers have processes of this number.
    name = f"callboard-{os.getpid()}-{os.urandom(4).hex()}"
    return Node(name, fleet=fleet.state.name, keys=fleet.keys(), **options)


def why_not(fleet: RunningFleet, error: BusError) -> CliError:
    """Return what to tell who could not ask the fleet's directory."""
    name, text = fleet.state.name, str(error)
    if KEY_REFUSED in text:
        return CliError(fleet.why_refused())
    if not fleet.is_remote:
        return CliError(f'the directory of fleet "{name}" does not answer ({text}): see callboard ps {name}')
    at = fleet.state.directory.endpoint
    if isinstance(error, AskTimeout) or "heard of" in text:
        return CliError(f"nothing answers at {at}: is that the address, and is its port open to this machine?")
    if "protocol version" in text:
        sentence = f"the fleet at {at} runs another version of Callboard, which speaks otherwise ({text})"
        return CliError(f"{sentence}: install the same one on both machines")
    if "nobody listens" in text:
        return CliError(f"nobody listens at {at}: is the fleet up, and is that the address of its bus?")
    if "there it takes keys" in text:
        return CliError(fleet.why_refused())
    if "the handshake failed" in text:
        if fleet.keys_folder is None:
            return CliError(fleet.why_refused())
        return CliError(f"the handshake with {at} failed: it is no bus of a fleet with keys")
    if "is not" in text and "fleet " in text:
        return CliError(f'the fleet at {at} is not named "{name}": give its name, as in NAME@{at}')
    return CliError(f'there is no fleet "{name}" at {at} ({text})')


async def _ask(fleet: RunningFleet, address: Address, message: Ask[R], timeout: float) -> R:
    async with visitor(fleet) as node:
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


def find_entries(fleet: RunningFleet, *, kind: str) -> list[Entry]:
    """Return the actors of a kind. Raises CliError if there is none, or the directory does not answer."""
    try:
        entries = list_entries(fleet)
    except BusError as error:
        raise why_not(fleet, error) from None
    found = [entry for entry in entries if entry.kind == kind]
    if not found:
        raise CliError(f'fleet "{fleet.state.name}" has no {kind}')
    return found
