"""What the nodes of a fleet remember, on the reader's clock: all their rings, or one request's part of them."""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from operator import attrgetter

from callboard.actors.protocol import Entry, ListEntries
from callboard.actors.trace_protocol import TRACER, GetRecords
from callboard.bus import Address, BusError, Node
from callboard.router.spans import request_of
from callboard.tools.errors import CliError
from callboard.tools.running import RunningFleet

from .attach import CREDIT, Where
from .clocks import NodeClock, measure
from .event import Event
from .followed import events_of

ASK_S = 10.0


@dataclass(slots=True)
class Past:
    """The records of a fleet's nodes, by time."""

    events: list[Event]
    entries: tuple[Entry, ...]
    missing: dict[str, str] = field(default_factory=dict)
    """Nodes that could not be asked, and why: what they know is not here."""


async def collect(node: Node, fleet: Where, request_id: str = "") -> Past:
    """Return what all nodes remember, or what they do of one request. Raises BusError without the directory."""
    directory = fleet.state.directory if isinstance(fleet, RunningFleet) else fleet
    view = await node.ref(directory).ask(ListEntries(), timeout=3.0)
    past = Past([], view.entries)
    addresses = {directory.node: directory}
    addresses |= {entry.address.node: entry.address for entry in view.entries if entry.address.endpoint}
    await asyncio.gather(*(_ask(node, address, request_id, past) for address in addresses.values()))
    past.events.sort(key=attrgetter("time"))
    return past


async def _ask(node: Node, address: Address, request_id: str, past: Past) -> None:
    tracer, clock = Address(address.node, address.endpoint, TRACER), NodeClock()
    try:
        await measure(node, tracer, clock)
        async with node.ref(tracer).stream(GetRecords(request_id), timeout=ASK_S, credit=CREDIT) as batches:
            async for batch in batches:
                past.events += events_of(node, address.node, clock, batch.records)
    except BusError as error:
        past.missing[address.node] = str(error)


def bare_id(request_id: str) -> str:
    """Return a request's id without the kind of answer that the HTTP API puts before it, such as ``chatcmpl-``."""
    return request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")


def resolve(wanted: str, known: Collection[str]) -> str:
    """Return the request that ``wanted`` names, by its id, a sequence's id, or how it alone begins. Raises CliError."""
    if wanted in known:
        return wanted
    if (root := request_of(wanted)) in known:
        return root
    found = sorted(each for each in known if wanted and (each.startswith(wanted) or bare_id(each).startswith(wanted)))
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        raise CliError(f'{len(found)} requests begin with "{wanted}": {some}')
    raise CliError(f'no node remembers a request "{wanted}": it may be too long ago, or its id misread')
