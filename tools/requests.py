"""``callboard requests``: a request's sub-requests, as the router saw them."""

import argparse

import msgspec

from callboard.actors.protocol import GetSubRequests, SubRequest
from callboard.bus import BusError
from callboard.router.spans import request_of

from .bus_client import ask, find_entries
from .errors import CliError
from .ps import WIDTH
from .running import RunningFleet, open_fleet
from .units import format_size


class Part(msgspec.Struct, frozen=True):
    """One sub-request, as ``--json`` prints it."""

    request_id: str
    verb: str
    actor: str
    start_ms: float
    ms: float
    num_bytes: int
    lane: str
    num_computed_tokens: int
    num_reused_tokens: int
    error: str


def run(arguments: argparse.Namespace) -> int:
    """Print the last request's sub-requests, or those of one by its id."""
    parts = parts_of(open_fleet(arguments.fleet, keys=arguments.keys), arguments.id)
    if not parts:
        if arguments.id is not None:
            raise CliError(f'the router keeps no request "{arguments.id}": it may be too long ago')
        if not arguments.json:
            print("The router has seen no request yet.")
            return 0
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(parts)).decode())
    else:
        print_parts(parts)
    return 0


def parts_of(fleet: RunningFleet, request_id: str | None) -> list[Part]:
    """Return the sub-requests of a request, of the last one by default, over all routers. Raises CliError."""
    found: list[tuple[SubRequest, ...]] = []
    why = "there is none"
    for router in find_entries(fleet, kind="router"):
        try:
            found.append(ask(fleet, router.address, GetSubRequests(request_id, limit=1)).items)
        except BusError as error:
            why = str(error)
    if not found:
        raise CliError(f"no router answers: {why}")
    if request_id is None:
        # Clocks of one machine, and routers are where the fleet was started.
        last = max(found, key=lambda items: max((item.start_s for item in items), default=0.0))
        request_id = last[0].request_id if last else None
        if request_id is not None and len(found) > 1:
            return parts_of(fleet, request_of(request_id))  # Another router may have begun it.
    items = sorted((item for items in found for item in items), key=lambda item: item.start_s)
    return [_part(item, items[0].start_s) for item in items]


def _part(item: SubRequest, begin: float) -> Part:
    return Part(
        item.request_id,
        item.verb,
        item.actor,
        round((item.start_s - begin) * 1000, 3),
        round((item.end_s - item.start_s) * 1000, 3),
        item.num_bytes,
        item.lane,
        item.num_computed_tokens,
        item.num_reused_tokens,
        item.error,
    )


def print_parts(parts: list[Part]) -> None:
    """Print a request's sub-requests as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, width=WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("SUB-REQUEST", "ACTOR", "AT MS", "MS", "BYTES", "LANE", "COMPUTED", "REUSED", "ERROR")
    for title in titles if any(part.error for part in parts) else titles[:-1]:
        is_text = title in ("SUB-REQUEST", "ACTOR", "LANE", "ERROR")
        table.add_column(title, justify="left" if is_text else "right", no_wrap=True)
    for part in parts:
        cells = [
            part.verb,
            part.actor,
            f"{part.start_ms:.1f}",
            f"{part.ms:.1f}",
            format_size(part.num_bytes),
            part.lane,
        ]
        cells += [str(part.num_computed_tokens), str(part.num_reused_tokens), escape(part.error)]
        table.add_row(*cells[: len(table.columns)])
    console.print(f"Request {parts[0].request_id}", markup=False)
    console.print(table)
    console.print("COMPUTED and REUSED count prompt tokens.", style="dim")
